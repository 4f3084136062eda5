"""Models as graphs of other runtimes: ONNX and torch.export, in the parallel form and as a recurrent step."""
