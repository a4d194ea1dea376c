// SPDX-License-Identifier: Apache-2.0
//! Figures beside runc
fn main() {}
