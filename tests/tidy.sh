#!/usr/bin/env bash
# Rules that no compiler checks. Each failure names the file and the rule.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"
bad=0
fail() { printf 'tidy: %s\n' "$*" >&2; bad=1; }

while read -r lines file; do
  [ "$file" = total ] && continue
  [ "$lines" -le 500 ] || fail "$file has $lines lines, at most 500 are allowed: split it"
done < <(git ls-files '*.rs' | xargs -r wc -l)

while read -r file; do
  head -6 "$file" | grep -q 'SPDX-License-Identifier: Apache-2.0' || fail "$file has no SPDX line"
done < <(git ls-files '*.rs' '*.sh' '*.proto')

while read -r file; do
  fail "$file: use foo.rs beside foo/ instead of mod.rs"
done < <(git ls-files '*/mod.rs')

while IFS= read -r hit; do
  fail "raw descriptor in a public signature: $hit"
done < <(git grep -nE 'pub (async )?fn .*RawFd' -- 'pkg/*.rs' || true)

# unsafe_code is denied by the lints; the crates that may allow it do so in one module each.
while IFS= read -r hit; do
  case $hit in
    pkg/guest-agent/src/sys.rs:* | pkg/vmm/src/sys.rs:* | pkg/network/src/sys.rs:* | pkg/storage/src/sys.rs:* | \
    pkg/shim/src/sys.rs:* | pkg/testkit/src/sys.rs:*) ;;
    *) fail "unsafe_code allowed outside a crate's sys.rs: $hit" ;;
  esac
done < <(git grep -n 'allow(unsafe_code' -- '*.rs' || true)

# Who may use whom: one way only. What is not listed is not allowed.
declare -A may=(
  [types]=""
  [transport]="types"
  [api]=""
  [agent-client]="types transport api"
  [config]=""
  [telemetry]="types"
  [storage]="types"
  [network]="types"
  [vmm]="types transport"
  [sandbox]="types transport api agent-client config vmm storage network telemetry"
  [shim]="types config sandbox telemetry"
  [guest-agent]="types transport api"
  [testkit]=""
)
for manifest in pkg/*/Cargo.toml; do
  crate=$(basename "$(dirname "$manifest")")
  [ -n "${may[$crate]+listed}" ] || { fail "pkg/$crate is in no list of who may use whom"; continue; }
  for used in $(sed -n '/^\[dependencies\]/,/^\[/s/^podhull-\([a-z-]*\).*/\1/p' "$manifest"); do
    [[ " ${may[$crate]} " == *" $used "* ]] || fail "pkg/$crate must not depend on podhull-$used"
  done
done
for crate in pkg/*/Cargo.toml; do
  grep -qE '^(anyhow|clap)\b' "$crate" && [ "$crate" != pkg/testkit/Cargo.toml ] && fail "$crate: anyhow and clap are for cmd/ and tests/"
done
grep -qE '^(tonic|ttrpc)\b' pkg/transport/Cargo.toml && fail "pkg/transport must not know gRPC or ttrpc"

[ "$bad" = 0 ] || exit 1
echo "tidy: $(git ls-files '*.rs' | wc -l) Rust files are in order"
