//! VMM processes and their helpers, confined and supervised.
