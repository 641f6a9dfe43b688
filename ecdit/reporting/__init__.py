"""What a run says while it trains: metrics, printed lines, TensorBoard, profiles."""
