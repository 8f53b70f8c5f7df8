"""Photos with 68 points in, a checkpoint out: data, augmentation, network, loss, training."""
