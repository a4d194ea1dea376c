// SPDX-License-Identifier: Apache-2.0
//! What the user sees: a line per step, with the time it took.

use std::env;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;

/// How far lines below a step are indented.
const INDENT: &str = "               ";

/// How a text stands out on a terminal that shows colours.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tone {
    Plain,
    Strong,
    Good,
    Bad,
    Notice,
    Quiet,
}

impl Tone {
    fn code(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Strong => Some("1"),
            Self::Good => Some("32"),
            Self::Bad => Some("1;31"),
            Self::Notice => Some("33"),
            Self::Quiet => Some("2"),
        }
    }
}

/// Standard output.
#[derive(Debug)]
pub(crate) struct Screen {
    terminal: bool,
    colours: bool,
    /// What is being done, and since when.
    doing: Option<(&'static str, Instant)>,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let terminal = io::stdout().is_terminal();
        Self {
            terminal,
            colours: terminal && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            doing: None,
        }
    }

    /// Shows what is being done, awaits it, and shows the sentence it ends with.
    pub(crate) async fn step<T>(
        &mut self,
        doing: &'static str,
        work: impl Future<Output = Result<(T, String)>>,
    ) -> Result<T> {
        let begin = Instant::now();
        self.doing = Some((doing, begin));
        if self.terminal {
            let dots = self.paint(Tone::Quiet, "...");
            self.write(&format!("  {dots}          {doing}"));
        }
        let (value, sentence) = work.await?;
        let ok = self.paint(Tone::Good, "ok");
        let took = took(begin.elapsed());
        self.overwrite();
        self.write(&format!("  {ok}  {took:>9}  {sentence}\n"));
        self.doing = None;
        Ok(value)
    }

    /// Begins a part.
    pub(crate) fn heading(&self, text: &str) {
        self.write(&format!("\n{}\n", self.paint(Tone::Strong, text)));
    }

    /// A line below a step.
    pub(crate) fn line(&self, tone: Tone, text: &str) {
        self.write(&format!("{INDENT}{}\n", self.paint(tone, text)));
    }

    /// A line, or several, of the program itself.
    pub(crate) fn say(&self, tone: Tone, text: &str) {
        for line in text.lines() {
            self.write(&format!("{}\n", self.paint(tone, line)));
        }
    }

    /// Says which step failed, and why.
    pub(crate) fn failed(&self, error: &anyhow::Error) {
        self.overwrite();
        let failed = self.paint(Tone::Bad, "FAILED");
        let step = self.doing.map_or_else(String::new, |(doing, begin)| {
            format!(" after {}: {doing}", took(begin.elapsed()))
        });
        let error = format!("{error:#}");
        self.write(&format!("  {failed}{step}\n\n{}\n\n", error.trim_end()));
    }

    /// Quotes a log.
    pub(crate) fn quote(&self, text: &str) {
        for line in text.lines() {
            let tone = if line.starts_with("--- ") {
                Tone::Strong
            } else {
                Tone::Plain
            };
            self.say(tone, line);
        }
    }

    /// A text as it is to be written.
    pub(crate) fn paint(&self, tone: Tone, text: &str) -> String {
        match tone.code() {
            Some(code) if self.colours && !text.is_empty() => format!("\x1b[{code}m{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }

    /// Takes the line back that says what is being done.
    fn overwrite(&self) {
        if self.terminal && self.doing.is_some() {
            self.write("\r\x1b[K");
        }
    }

    fn write(&self, text: &str) {
        let mut stdout = io::stdout().lock();
        // Nobody may be reading any more; the exit code still tells.
        let _ = stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush());
    }
}

/// A duration as people read it.
pub(crate) fn took(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{} ms", time.as_millis())
    } else {
        format!("{:.2} s", time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        assert_eq!(took(Duration::from_micros(1999)), "1 ms");
        assert_eq!(took(Duration::from_millis(1234)), "1.23 s");
    }
}
