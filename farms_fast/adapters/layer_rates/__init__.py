"""What every rule shares that makes a layer's learning rate from its alpha."""
