//! A pod's network on the host: netns, tap, redirects.
