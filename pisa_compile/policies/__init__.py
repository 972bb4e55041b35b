"""How sparse what is: policies and schedules, how they are attached, their files, known models."""
