// SPDX-License-Identifier: Apache-2.0
//! The secret that host and agent share.

use std::fmt;

/// A random secret handed to the agent before any container exists. Never
/// printed, never on a command line.
#[derive(Clone)]
pub struct Token([u8; Token::LEN]);

impl Token {
    /// Length in bytes.
    pub const LEN: usize = 32;

    /// Takes bytes that came from the kernel's random source or from the peer.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The bytes, to be sent to the peer.
    #[must_use]
    pub fn expose(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// Compares in a time that does not depend on where the two differ.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        let difference = self
            .0
            .iter()
            .zip(&other.0)
            .fold(0u8, |acc, (a, b)| acc | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_only_the_same_bytes() {
        let token = Token::from_bytes([7; 32]);
        assert!(token.matches(&Token::from_bytes([7; 32])));
        let mut other = [7; 32];
        other[31] ^= 1;
        assert!(!token.matches(&Token::from_bytes(other)));
    }

    #[test]
    fn is_never_printed() {
        assert!(!format!("{:?}", Token::from_bytes([7; 32])).contains('7'));
    }
}
