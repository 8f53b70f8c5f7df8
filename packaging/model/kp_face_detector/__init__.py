"""The face detector's bundle: data for `kp_runtime.load_detector()`."""
