"""Models as ONNX files: functions of arrays, converted primitive by primitive, and a runner."""
