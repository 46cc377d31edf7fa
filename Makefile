# Every target does all of its own set-up. `make` lists them.

# On a build server the lock file must be complete; at home Cargo may complete it.
LOCKED := $(if $(CI),--locked)
CRD := crds/serviceregistrations.yaml
CLIENTS := $(dir $(wildcard tests/interop/*/go.mod))

.DEFAULT_GOAL := help
.PHONY: help setup tools clients build fmt lint test interop soak load mutants demo bench crds deny clean fuzz protocol image image-test e2e-kind old-kubernetes

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing (protoc and the like), check Rust and Go
	@hack/setup

tools: setup ## build kube-apiserver, etcd and the others once, into the user's cache folder
	@cargo run --quiet $(LOCKED) --package etcd-registrar-testbed --bin testbed -- tools

clients: setup ## build the clients of the interop tests once, into the user's cache folder
	@cargo run --quiet $(LOCKED) --package etcd-registrar-testbed --bin testbed -- programs $(CLIENTS)

build: setup ## build the operator for release
	cargo build --release $(LOCKED) --bin etcd-registrar

fmt: setup ## format the code
	cargo fmt --all

lint: setup ## check the format, and clippy with warnings as errors, also of the discovery library alone
	cargo fmt --all --check
	@unformatted=$$(gofmt -l tests/interop testbed); test -z "$$unformatted" || { echo "lint: gofmt: $$unformatted" >&2; exit 1; }
	cargo clippy --workspace --all-targets $(LOCKED) -- --deny warnings
	cargo clippy --no-default-features --features discovery $(LOCKED) -- --deny warnings
	@if cargo tree --no-default-features --features discovery --edges normal --prefix none $(LOCKED) | \
	    grep -E '^(kube|k8s-openapi|schemars|clap) '; then \
	    echo "lint: the discovery library needs what only the operator should" >&2; exit 1; fi

# The tools and clients first: inside a test their progress would not be seen.
test: lint tools clients ## what CI runs before e2e-kind: format, clippy, unit, property, end-to-end and fault tests
	cargo test --workspace --no-fail-fast $(LOCKED)

# MARKDOWN writes the table anew: make interop MARKDOWN=docs/formats.md
interop: tools clients ## the real clients of other projects against what the operator writes
	INTEROP_MARKDOWN="$(MARKDOWN)" cargo test $(LOCKED) --test interop -- --nocapture

# SOAK_MINUTES and SOAK_SCHEDULES say for how long: make soak SOAK_SCHEDULES=100000
soak: setup ## run the simulation with new seeds, 30 minutes or SOAK_MINUTES or SOAK_SCHEDULES
	cargo test $(LOCKED) --profile soak --test simulation soak -- --ignored --nocapture

# LOAD_PODS and LOAD_SECONDS make it smaller: make load LOAD_PODS=1000 LOAD_SECONDS=5
load: tools ## replace 10,000 pods and let them flap, with etcd well, frozen and slow (10 minutes)
	cargo test $(LOCKED) --profile soak --test load -- --include-ignored --nocapture --test-threads=1

# GUARDS names some: make mutants GUARDS="lane,barrier"
mutants: tools ## take the guards of the protocol out one at a time: a test has to fail for each
	GUARDS="$(GUARDS)" cargo test $(LOCKED) --test guards -- --ignored --nocapture

# MINUTES says for how long: make fuzz MINUTES=60
fuzz: MINUTES ?= 10
fuzz: setup
fuzz: ## change inputs at random and look that nothing panics or leaves its place
	FUZZ_MINUTES=$(MINUTES) cargo test $(LOCKED) --test fuzz -- --nocapture --test-threads=5

protocol: ## check the model of the protocol with TLC (needs Java and Maven)
	@docs/protocol/check holds

# IMAGE names it, ARCHITECTURES says which: make image IMAGE=registry.example.com/etcd-registrar:1 ARCHITECTURES=amd64
image: ## build the image (static, from nothing, amd64 and arm64) into target/image/
	@hack/setup image
	@hack/image $(ARCHITECTURES)

image-test: image tools ## look at the image, run both architectures, and build it a second time elsewhere to compare
	cargo test $(LOCKED) --test image -- --ignored
	hack/reproduce

# KIND_STEPS names some steps, KIND_KEEP=1 leaves the clusters up. Starts Docker where root may, and stops it again; builds the
# nodes' image.
e2e-kind: setup ## the operator from its image and chart on two kind clusters (needs Docker; 15 minutes)
	@hack/e2e-kind

# The API server two minor versions before that of the testbed, built once; what it takes, and the operator on it.
old-kubernetes: tools ## the definition, its rules and the basic tests on an older Kubernetes
	@assets=$$(cargo run --quiet $(LOCKED) --package etcd-registrar-testbed --bin testbed -- old-kubernetes) && \
	    KUBEBUILDER_ASSETS=$$assets cargo test $(LOCKED) --test e2e -- basic:: objects:: status:: changes:: pods:: rbac::

demo: build tools ## two clusters, an etcd and the operators, walked through step by step
	@cargo run --quiet --release $(LOCKED) --package etcd-registrar-testbed --bin demo

# BENCH names parts and flags: make bench BENCH="propagation --quick"
bench: setup tools ## measure the operator against a bare floor
	cargo bench $(LOCKED) --bench operator -- $(BENCH)

crds: setup ## generate the CustomResourceDefinition from the Rust types
	@mkdir -p $(dir $(CRD))
	cargo run --quiet $(LOCKED) --bin etcd-registrar -- crd > $(CRD).new
	mv $(CRD).new $(CRD)

deny: ## check licences, advisories and sources of the dependencies
	@if command -v cargo-deny >/dev/null; then cargo deny check; \
	else echo "deny: cargo-deny is not installed: cargo install --locked cargo-deny" >&2; exit 1; fi

clean: ## remove what was built here (not the tools in the cache folder)
	cargo clean
