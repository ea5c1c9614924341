"""What the plugin's speed and memory are measured on and with."""
