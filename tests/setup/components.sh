#!/usr/bin/env bash
# Checks for what `make lint` needs of Rust.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/lib.sh"

# rustup has a program on PATH also for what is not installed: it must answer.
for component in "clippy clippy" "fmt rustfmt"; do
  cargo "${component% *}" --version >/dev/null 2>&1 ||
    die "cargo ${component% *} does not run: rustup component add ${component#* } (https://rustup.rs)"
done
