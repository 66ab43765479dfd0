"""What is trained with labels: networks around the pretrained content branch, and what they predict."""
