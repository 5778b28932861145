"""Optimizers over this rank's parts of the parameters, and the learning rate of each step.

    config.py         OptimizerConfig, the section of a run's configuration
    learning_rate.py  the learning rate of a step
    update.py         Optimizer: the update of what a rank owns, clipping, the gradient norm, what a checkpoint holds
    loss_scale.py     LossScale, which fp16 multiplies the loss by; grad_scaler.py is the same for a script
    registry.py       the update rules by name; one file each

A new optimizer is a file with an `UpdateRule`, and its line in the registry.
"""
