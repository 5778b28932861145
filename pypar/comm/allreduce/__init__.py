"""All-reduce between the GPUs of a machine by kernels that read each other's memory."""
