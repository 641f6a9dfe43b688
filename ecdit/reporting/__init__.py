"""Reports a run while it trains: metrics, printed lines, TensorBoard, profiles."""
