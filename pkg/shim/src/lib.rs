//! containerd's contract: bootstrap, Task and Sandbox services, events.
