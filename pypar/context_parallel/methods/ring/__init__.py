"""Ring attention: keys and values go round the ranks while attention to those that are there is computed."""
