"""What ngrok knows: its API, our identity there, and how patiently we ask."""
