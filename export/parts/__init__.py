"""What stands beside the U-Net in a pipeline: text encoders, tokenizers, autoencoder."""
