#!/usr/bin/env bash
# Builds the guest a second time, elsewhere, and compares.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"

again=$(mktemp -d "$CACHE/again.XXXXXX")
trap 'rm -rf "$again"' EXIT
# Another path, another target folder, another cache: none of them may be in the result.
# The files are those of the checkout, committed or not.
mkdir "$again/tree"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
  [ ! -e "$file" ] || printf '%s\0' "$file"
done | cpio --quiet --null --pass-through --make-directories "$again/tree"
make -s -C "$again/tree" guest CACHE="$again/cache" PODHULL_CACHE="$again/cache" CARGO_TARGET_DIR="$again/target"
for file in vmlinux initramfs.cpio; do
  first=$(sha256sum <"target/guest/$file" | cut -d' ' -f1)
  second=$(sha256sum <"$again/tree/target/guest/$file" | cut -d' ' -f1)
  [ "$first" = "$second" ] || die "$file differs between two builds: $first and $second"
  echo "$file: $first, twice"
done
