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
done < <(git ls-files '*.rs' '*.sh' '*.c' '*.go' | xargs -r wc -l)

while read -r file; do
  head -10 "$file" | grep -q 'SPDX-License-Identifier: Apache-2.0' || fail "$file has no SPDX line"
done < <(git ls-files '*.rs' '*.sh' '*.proto')

while read -r file; do
  fail "$file: use foo.rs beside foo/ instead of mod.rs"
done < <(git ls-files '*/mod.rs')

# A signature may go over several lines.
while IFS= read -r hit; do
  fail "raw descriptor in public: $hit"
done < <(git ls-files 'pkg/*/src/*.rs' | xargs -r perl -0ne '
  while (/\bpub (?:async |const |unsafe )*fn (\w+)[^;{]*\bRawFd\b/g) { print "$ARGV: fn $1\n" }
  while (/^ *pub (\w+): [^,\n]*\bRawFd\b/gm) { print "$ARGV: field $1\n" }')

# What opens, duplicates or takes over a descriptor of a guest is in pkg/transport. What looks like it
# elsewhere is named here with what it is for. Test modules within a file may do as they like.
declare -A may_connect=(
  [pkg/agent-client/src/channel.rs]="gRPC over the transport that it was given"
  [pkg/guest-agent/src/containers.rs]="the helper's socket, inside the guest"
  [pkg/guest-agent/src/oci/exec.rs]="the console's socket, inside the guest"
  [pkg/guest-agent/src/sessions.rs]="a pod's server, inside the guest"
  [pkg/guest-agent/src/stdio.rs]="a terminal, inside the guest"
  [pkg/guest-agent/src/sys.rs]="what a helper inherited"
  [pkg/network/src/pod.rs]="a network namespace"
  [pkg/shim/src/bootstrap.rs]="the shim's own socket"
  [pkg/shim/src/delete.rs]="the socket of the shim that is to end"
  [pkg/shim/src/publisher.rs]="containerd"
  [pkg/shim/src/server.rs]="what the shim inherited from its start"
  [pkg/testkit/src/containerd.rs]="containerd's log"
  [pkg/testkit/src/cri.rs]="containerd"
  [pkg/testkit/src/pod_netns.rs]="a pod's network namespace, and a server in it"
  [pkg/vmm/src/child.rs]="a process of the host"
  [pkg/vmm/src/launch.rs]="QEMU's end towards the file server"
  [pkg/vmm/src/sys.rs]="what a helper inherited"
  [pkg/vmm/src/vsock.rs]="QEMU's end towards the vsock daemon"
)
declare -A connects=()
while IFS= read -r hit; do
  file=${hit%%:*}
  connects[$file]=yes
  [ -n "${may_connect[$file]+listed}" ] || fail "a connection outside pkg/transport: $hit"
done < <(git ls-files 'pkg/*/src/*.rs' 'cmd/*.rs' | grep -v '^pkg/transport/' | xargs -r perl -0777 -ne '
  s{^(\h*)#\[cfg\((?:all\()?test\b.*\]\n(?:\1#\[(?:.*|\n(?:.*\n)*?\1\))\]\n)*\1(?:pub(?:\(\w+\))? )?mod \w+ \{\n(?:.*\n)*?\1\}\n}
   {"\n" x ($& =~ tr/\n//)}gem;
  my $number = 0;
  for (split /\n/) {
    $number++;
    print "$ARGV:$number: $_\n" if !m{^\s*//} &&
      /(?<!fn )\b(?:connect|socket)(?:_timeout|_unix|_addr|_with)?\((?!\))|\bfrom_raw_fd\(|\bdup[23]?\(|(?i:dupfd)|pidfd_getfd|\btry_clone(?:_to_owned)?\(|\btokio_vsock\b|\bVsock(?:Stream|Addr)\b/;
  }')
for file in "${!may_connect[@]}"; do
  [ -n "${connects[$file]+found}" ] || fail "$file is listed for a connection that it does not make"
done

# unsafe_code is denied by the lints, which every crate takes over; the crates that may allow it do so in
# one small module each, where clippy asks every block for its reason.
while IFS= read -r hit; do
  case $hit in
    pkg/guest-agent/src/sys.rs:* | pkg/vmm/src/sys.rs:* | pkg/network/src/sys.rs:* | pkg/storage/src/sys.rs:* | \
    pkg/shim/src/sys.rs:* | pkg/testkit/src/sys.rs:*) ;;
    *) fail "unsafe_code allowed outside a crate's sys.rs: $hit" ;;
  esac
  lines=$(wc -l <"${hit%%:*}")
  [ "$lines" -le 150 ] || fail "${hit%%:*} allows unsafe_code and has $lines lines, at most 150 are allowed"
done < <(git grep -nE '(allow|expect|warn)\(.*unsafe_code' -- '*.rs' || true)
while IFS= read -r manifest; do
  grep -A1 '^\[lints\]' "$manifest" | grep -q '^workspace = true' || fail "$manifest does not take over the workspace's lints"
done < <(git ls-files '*/Cargo.toml')

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

# A mutation whose line is gone breaks nothing, and one whose test is gone is seen by nobody.
while IFS= read -r wrong; do
  fail "$wrong"
done < <(perl -e '
  sub slurp { open my $file, "<", $_[0] or return ""; local $/; <$file> }
  my $readme = slurp("tests/README.md");
  my $tests = join "", map { slurp($_) } split /\n/, `git ls-files "tests/cri/src/cases/*.rs" "pkg/*.rs"`;
  for my $list ("list", "units") {
    for (split /\n/, slurp("tests/mutations/$list.txt")) {
      next if /^#/ or /^\s*$/;
      my ($name, $file, $from, $to, @how) = map { s/^\s+|\s+$//gr =~ s/\\\|/|/gr } split /(?<!\\)\|/;
      print "mutation $name: \"$from\" is not in $file\n" if index(slurp($file), $from) < 0;
      print "mutation $name: no test $how[2]\n" if index($tests, $how[2]) < 0;
      print "mutation $name: tests/README.md has no row of it\n" if index($readme, "| $name: ") < 0;
    }
  }')

[ "$bad" = 0 ] || exit 1
echo "tidy: $(git ls-files '*.rs' | wc -l) Rust files are in order"
