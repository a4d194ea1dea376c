// SPDX-License-Identifier: Apache-2.0
//! Errors as people read them.

use std::error::Error;

/// An error with all its causes, in one line. An error of ours says only what
/// failed, and has the reason as its source.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text = format!("{text}: {source}");
        cause = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("read {0}")]
    struct Outer(&'static str, #[source] std::fmt::Error);

    #[test]
    fn every_cause_is_told_once() {
        let text = chain(&Outer("/file", std::fmt::Error));
        assert_eq!(text, format!("read /file: {}", std::fmt::Error));
    }
}
