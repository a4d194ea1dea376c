// SPDX-License-Identifier: Apache-2.0
//! The report, as Markdown.

use std::fmt::Write;

use crate::machine::Machine;
use crate::options::Options;
use crate::quick::{Measured, PARTS, STEPS};
use crate::sessions;
use crate::statistics::{Series, high_name};
use crate::vsock::{Floor, Pair};

/// Everything that was measured.
pub(crate) fn markdown(measured: &Measured, options: &Options) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = times(&mut text, measured, options)
        .and_then(|()| memory(&mut text, measured, options))
        .and_then(|()| circumstances(&mut text, measured, options));
    text
}

/// What was measured of sessions.
pub(crate) fn sessions(measured: &sessions::Measured, options: &Options) -> String {
    let mut text = String::new();
    let _ = session_figures(&mut text, measured, options)
        .and_then(|()| vsock_floor(&mut text, &measured.floor))
        .and_then(|()| place(&mut text, &measured.machine, &measured.load_at_end, options));
    text
}

/// The floor of sessions alone.
pub(crate) fn floor(floor: &Floor) -> String {
    let mut text = String::new();
    let _ = vsock_floor(&mut text, floor);
    text
}

fn session_figures(text: &mut String, measured: &sessions::Measured, options: &Options) -> Written {
    let other = &options.handler;
    writeln!(
        text,
        "| ms where nothing else is said | n | runc median | runc high | {other} median | {other} high |\n|---|--:|--:|--:|--:|--:|"
    )?;
    let (runc, podhull) = (&measured.runc, &measured.other);
    let names = sessions::FIGURES.into_iter().chain(sessions::COSTS);
    let left = runc.figures.iter().chain(&runc.costs);
    let right = podhull.figures.iter().chain(&podhull.costs);
    for ((name, left), right) in names.zip(left).zip(right) {
        writeln!(
            text,
            "| {name} | {} | {} | {} | {} | {} |",
            left.len(),
            ms(left.median()),
            ms(left.high()),
            ms(right.median()),
            ms(right.high())
        )?;
    }
    writeln!(
        text,
        "\nHigh: the 99th percentile of at least a hundred values, else the largest.\n"
    )
}

fn vsock_floor(text: &mut String, floor: &Floor) -> Written {
    writeln!(
        text,
        "| a guest that only moves bytes, over the same vsock | n | median | high |\n|---|--:|--:|--:|"
    )?;
    let mut row = |name: &str, series: &Series| {
        let (median, high) = (ms(series.median()), ms(series.high()));
        writeln!(text, "| {name} | {} | {median} | {high} |", series.len())
    };
    row("connection (ms)", &floor.dial)?;
    row("connection and handshake of a session (ms)", &floor.open)?;
    for (way, pair) in [("out of", &floor.out), ("into", &floor.into)] {
        row(&format!("raw copy {way} the guest (MiB/s)"), &pair.raw)?;
        row("the same through a session (MiB/s)", &pair.session)?;
    }
    let share = |pair: &Pair| Some(pair.session.median()? / pair.raw.median()?);
    let share = |pair| share(pair).map_or_else(|| "–".into(), |share| format!("{share:.2}"));
    writeln!(
        text,
        "\nThrough a session, of the raw copy: {} out of the guest, {} into it.\n",
        share(&floor.out),
        share(&floor.into)
    )
}

type Written = std::fmt::Result;

fn times(text: &mut String, measured: &Measured, options: &Options) -> Written {
    let (other, high) = (&options.handler, high_name(options.runs));
    let (runc, podhull) = (&measured.runc, &measured.other);
    writeln!(
        text,
        "| time (ms), n = {} | runc median | runc {high} | {other} median | {other} {high} |\n|---|--:|--:|--:|--:|",
        options.runs
    )?;
    let mut row = |name: &str, left: &Series, right: &Series| {
        writeln!(
            text,
            "| {name} | {} | {} | {} | {} |",
            ms(left.median()),
            ms(left.high()),
            ms(right.median()),
            ms(right.high())
        )
    };
    for (index, name) in STEPS.into_iter().enumerate() {
        row(name, &runc.steps[index], &podhull.steps[index])?;
        if index == 2 {
            row(
                "**sum of these three**",
                &runc.until_runs,
                &podhull.until_runs,
            )?;
        }
    }
    if let Some(floor) = &measured.floor {
        let none = Series::default();
        row(
            "floor: bare boot, exec of QEMU to the agent's first line",
            &none,
            &floor.first_line,
        )?;
        row(
            "floor: bare boot, exec of QEMU to its end",
            &none,
            &floor.end,
        )?;
    }
    writeln!(text)
}

fn memory(text: &mut String, measured: &Measured, options: &Options) -> Written {
    let (other, high) = (&options.handler, high_name(options.runs));
    let (runc, podhull) = (&measured.runc, &measured.other);
    writeln!(
        text,
        "| memory of a pod on the node (PSS, MiB) | runc median | runc {high} | {other} median | {other} {high} |\n|---|--:|--:|--:|--:|"
    )?;
    let mut row = |name: &str, left: &Series, right: &Series| {
        writeln!(
            text,
            "| {name} | {} | {} | {} | {} |",
            mib(left.median()),
            mib(left.high()),
            mib(right.median()),
            mib(right.high())
        )
    };
    for (index, (_, name)) in PARTS.into_iter().enumerate() {
        row(name, &runc.memory[index], &podhull.memory[index])?;
    }
    row("**sum**", &runc.memory_sum, &podhull.memory_sum)?;
    if podhull.guest.median().is_some() {
        row(
            "of that in use in the guest (MemTotal − MemAvailable)",
            &runc.guest,
            &podhull.guest,
        )?;
    }
    writeln!(text)
}

fn circumstances(text: &mut String, measured: &Measured, options: &Options) -> Written {
    place(text, &measured.machine, &measured.load_at_end, options)?;
    if let Some(floor) = &measured.floor {
        // Where the checkout is matters to nobody.
        let root = format!("{}/", podhull_testkit::programs::workspace().display());
        let command = floor.command.replace(&root, "");
        writeln!(text, "- Command of the floor: `{command}`")?;
    }
    Ok(())
}

fn place(text: &mut String, machine: &Machine, load_at_end: &str, options: &Options) -> Written {
    writeln!(text, "- Date: {}", machine.date)?;
    writeln!(
        text,
        "- Host: {}, {} cores, {}, Linux {}",
        machine.cpu, machine.cores, machine.memory, machine.kernel
    )?;
    writeln!(
        text,
        "- Load average (1, 5, 15 min): {} at the start, {} at the end",
        machine.load, load_at_end
    )?;
    writeln!(
        text,
        "- containerd {}, {}",
        machine.containerd, machine.runc
    )?;
    if let Some(vmm) = &machine.vmm {
        writeln!(text, "- {vmm}")?;
    }
    writeln!(text, "- Command: `{}`", options.command())
}

/// A dash for what does not exist.
fn ms(value: Option<f64>) -> String {
    match value {
        None => "–".into(),
        Some(value) if value < 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.0}"),
    }
}

fn mib(value: Option<f64>) -> String {
    value.map_or_else(|| "–".into(), |value| format!("{value:.1}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_times_keep_a_digit_and_absent_ones_are_a_dash() {
        assert_eq!(ms(Some(9.94)), "9.9");
        assert_eq!(ms(Some(123.4)), "123");
        assert_eq!(ms(None), "–");
        assert_eq!(mib(Some(1.25)), "1.2");
    }
}
