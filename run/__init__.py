"""What every run does alike: device, seed, schedule, optimizer, checkpoint and resume, log."""
