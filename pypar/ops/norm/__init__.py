"""What rms_norm and layer_norm share: definition, backends, registration. Each has its own file beside this folder."""
