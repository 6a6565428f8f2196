"""What a job will take, before it is run: time, memory, disk, money, and whether it can run at
all."""
