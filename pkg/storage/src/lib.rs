//! The tree that a pod shares with its guest: root filesystems and volumes.
