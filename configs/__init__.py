"""What a job is: typed, frozen configuration, its presets and its checks."""
