"""What passes between the stages of a pipeline: its header, its transfers, and when a rank starts to receive it."""
