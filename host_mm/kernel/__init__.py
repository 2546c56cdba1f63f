"""What the models need of a kernel's core: tasks, locks, time, errors."""
