"""A checkpoint in, a bundle out: ONNX files, and the proof that their keypoints are PyTorch's."""
