# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. Everything built once is kept in $(CACHE), outside the checkout.
SHELL := /bin/bash

CACHE ?= $(or $(PODHULL_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/podhull)
export PODHULL_CACHE := $(CACHE)
export CARGO_TARGET_DIR ?= $(CACHE)/target
export CARGO_TERM_COLOR ?= auto

TRIPLE  := x86_64-unknown-linux-gnu
RELEASE := $(CARGO_TARGET_DIR)/release
GUEST   := target/guest
AGENT   := $(CARGO_TARGET_DIR)/agent/$(TRIPLE)/release/podhull-agent
SETUP   := tests/setup

# The programs under test; the suites read these.
export PODHULL_SHIM         ?= $(RELEASE)/containerd-shim-podhull-v2
export PODHULL_KERNEL       ?= $(CURDIR)/$(GUEST)/vmlinux
export PODHULL_INITRAMFS    ?= $(CURDIR)/$(GUEST)/initramfs.cpio
export PODHULL_VSOCK_DAEMON ?= $(CACHE)/bin/vhost-device-vsock-0.3.0/vhost-device-vsock
export PODHULL_CONTAINERDS  ?= $(CACHE)/bin
export PODHULL_STREAMS      ?= $(CACHE)/bin/streams/streams

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "%-16s %s\n", $$1, $$2 }'

.PHONY: demo
demo: packages tools guest shim ## a pod in its own microVM on a stock containerd, from nothing
	@cargo build --release --locked -p podhull-demo
	@$(RELEASE)/podhull-demo

.PHONY: test
test: ## everything that must pass before a change lands
	@tests/run-tests.sh

.PHONY: guest
guest: kernel initramfs ## kernel and initramfs for the guest, in target/guest; GUEST_KERNEL=debian for Debian's

.PHONY: shim
shim: packages ## the shim's release build
	@cargo build --release --locked -p containerd-shim-podhull-v2

.PHONY: lint
lint: packages ## rustfmt, clippy, rustdoc, cargo-deny, tidiness
	@tests/lint.sh

.PHONY: test-unit
test-unit: packages ## unit and crate tests
	@tests/unit.sh

comma := ,
CONTAINERDS := $(patsubst all,1.6$(comma)1.7$(comma)2.1$(comma)2.4,$(or $(CONTAINERD),1.6$(comma)2.4))

.PHONY: test-cri
test-cri: packages tools streams guest shim ## the CRI suite; CONTAINERD=1.6,2.4 (the default), 1.7, 2.1 or all; FILTER=part of a case's name
	@cargo build --release --locked -p podhull-cri-tests
	@$(SETUP)/containerd.sh $(if $(findstring 1.7,$(CONTAINERDS)),1.7.35) $(if $(findstring 2.1,$(CONTAINERDS)),2.1.9) 2.4.2
	@$(RELEASE)/podhull-cri-tests --containerd $(CONTAINERDS) $(FILTER)

.PHONY: test-core
test-core: packages tools streams guest shim ## the core cases of the CRI suite, on containerd 2.4 and 1.6
	@cargo build --release --locked -p podhull-cri-tests
	@$(RELEASE)/podhull-cri-tests --core

.PHONY: compatibility
compatibility: packages ## docs/compatibility.md and docs/fields.md, from the cases and the tables of fields
	@mkdir -p target
	@cargo run --quiet --release --locked -p podhull-cri-tests -- --compatibility >target/compatibility.md
	@mv target/compatibility.md docs/compatibility.md
	@PODHULL_UPDATE_DOCS=1 cargo test --quiet --locked -p podhull-shim --lib -- the_page_is_what_the_tables_say >/dev/null

.PHONY: test-all
test-all: ## long checks, resumable: PART=cri, cri-others, mutations, reproducible, debian-kernel, heavy, kvm-smoke, kvm, miri
	@tests/run-part.sh $(or $(PART),all)

.PHONY: bench-quick
bench-quick: packages tools guest shim ## figures beside runc, as a Markdown table; RUNS=100 for a 99th percentile
	@cargo build --release --locked -p podhull-bench
	@$(RELEASE)/podhull-bench quick $(addprefix -n ,$(RUNS))

.PHONY: bench-sessions
bench-sessions: packages tools streams guest shim ## exec, terminals and forwarded ports beside runc; RUNS=100
	@deploy/guest/build-agent.sh podhull-bench-guest
	@deploy/guest/build-initramfs.sh $(dir $(AGENT))podhull-bench-guest $(GUEST)/bench.cpio
	@cargo build --release --locked -p podhull-bench
	@PODHULL_BENCH_INITRAMFS=$(CURDIR)/$(GUEST)/bench.cpio $(RELEASE)/podhull-bench sessions $(addprefix -n ,$(RUNS))

# Other cases: FILTER="fault_ exec_".
.PHONY: test-kvm
test-kvm: ## transports and core cases on a node with real KVM, vhost-vsock and cgroup v2, inside an emulated machine
	@tests/run-part.sh kvm

# --- parts ---------------------------------------------------------------------
.PHONY: packages
packages:
	@$(SETUP)/packages.sh

.PHONY: tools
tools: packages ## containerd 2.4 and the vsock daemon, in the cache
	@$(SETUP)/containerd.sh
	@$(SETUP)/vsock-daemon.sh

# Only the suites need it.
.PHONY: streams
streams: packages
	@$(SETUP)/streams.sh

.PHONY: kernel
kernel: packages
	@deploy/guest/build-kernel.sh $(GUEST)/vmlinux

.PHONY: initramfs
initramfs: packages $(if $(filter debian,$(GUEST_KERNEL)),kernel)
	@deploy/guest/build-agent.sh
	@deploy/guest/build-initramfs.sh $(AGENT) $(GUEST)/initramfs.cpio \
	  $(if $(filter debian,$(GUEST_KERNEL)),$(GUEST)/vmlinux.modules)

.PHONY: clean
clean: ## removes target/ (the cache stays; its place: make cache)
	@rm -rf target

.PHONY: cache
cache: ## prints the cache's folder
	@echo $(CACHE)
