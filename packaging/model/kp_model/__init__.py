"""A packed bundle: manifest.json and the files that it names. `kp_runtime.load()` finds it."""
