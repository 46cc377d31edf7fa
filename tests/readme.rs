//! The documents tell the truth: what they name exists, what exists is named, and their examples are accepted.

// Clippy takes only the `#[test]` functions themselves for tests, and not their helpers.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use etcd_registrar::accept::policy::Policy;
use etcd_registrar::accept::{AcceptSettings, accept};
use etcd_registrar::api::ServiceRegistration;
use etcd_registrar::cli::Cli;
use etcd_registrar::format::Format;
use etcd_registrar::mirror::leases::SlotName;
use serde::Deserialize;
use serde_yaml::Value;

type Names = BTreeSet<String>;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The names of the entries of a folder.
fn entries(folder: &str) -> Names {
    fs::read_dir(path(folder))
        .unwrap_or_else(|error| panic!("{folder}: {error}"))
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

/// The fenced blocks of a language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    text.split(&format!("```{language}\n"))
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap_or_default().to_owned())
        .collect()
}

/// The cells of the table rows below a heading.
fn table(text: &str, heading: &str) -> Vec<Vec<String>> {
    let section = text
        .split(&format!("\n## {heading}\n"))
        .nth(1)
        .unwrap_or_else(|| panic!("no heading {heading}"));
    section
        .split("\n## ")
        .next()
        .unwrap_or_default()
        .lines()
        .filter(|line| line.starts_with('|'))
        .map(|line| {
            line.trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect()
        })
        // The head of the table, and the line below it.
        .skip(2)
        .collect()
}

/// The text in backquotes, if it is all of the cell or its beginning.
fn quoted(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.split('`').next()
}

/// Every registration in some YAML documents.
fn registrations(yaml: &str) -> Vec<ServiceRegistration> {
    serde_yaml::Deserializer::from_str(yaml)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|document| document["kind"] == "ServiceRegistration")
        .map(|document| serde_yaml::from_value(document).unwrap())
        .collect()
}

fn assert_accepted(file: &str, registration: &ServiceRegistration, policy: &Policy) {
    let settings = AcceptSettings {
        cluster_name: "east".into(),
        registrar_prefix: "/registrar/".into(),
    };
    let namespace = registration.metadata.namespace.as_deref();
    let name = registration.metadata.name.as_deref().unwrap();
    accept(
        namespace.unwrap_or("default"),
        name,
        &registration.spec,
        policy,
        &settings,
    )
    .unwrap_or_else(|refusal| panic!("{file}: {name}: {refusal}"));
}

#[test]
fn the_registrations_of_the_readme_are_accepted() {
    let readme = read("README.md");
    let found: Vec<_> = blocks(&readme, "yaml")
        .iter()
        .flat_map(|block| registrations(block))
        .collect();
    assert!(!found.is_empty());
    for registration in &found {
        assert_accepted("README.md", registration, &Policy::default());
    }
    // The first is the one that `make demo` applies.
    let first: Value = serde_yaml::from_str(&blocks(&readme, "yaml")[0]).unwrap();
    let example: Value = serde_yaml::from_str(&read("examples/web.yaml")).unwrap();
    assert_eq!(first, example);
}

#[test]
fn the_examples_are_accepted_under_the_policy_among_them() {
    let policy = Policy::parse(&read("examples/policy.yaml")).unwrap();
    let mut count = 0;
    for file in entries("examples") {
        if file.ends_with(".yaml") && file != "policy.yaml" {
            for registration in registrations(&read(&format!("examples/{file}"))) {
                assert_accepted(&file, &registration, &policy);
                count += 1;
            }
        }
    }
    assert!(count >= 8, "{count} registrations");
}

#[test]
fn the_examples_are_listed() {
    let listed: Names = read("examples/README.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| [")?.split(']').next())
        .map(str::to_owned)
        .collect();
    let mut there = entries("examples");
    there.remove("README.md");
    assert_eq!(listed, there);
}

#[test]
fn the_policies_in_the_documents_can_be_read() {
    for block in blocks(&read("docs/policy.md"), "yaml") {
        let policy = Policy::parse(&block).unwrap();
        assert_eq!(policy.rules[0], Policy::default().rules[0]);
    }
    let confined = &blocks(&read("docs/security.md"), "yaml")[0];
    assert_eq!(Policy::parse(confined).unwrap().rules.len(), 2);
    let deployed: Value = serde_yaml::from_str(&read("deploy/policy.yaml")).unwrap();
    let policy = Policy::parse(deployed["data"]["policy.yaml"].as_str().unwrap()).unwrap();
    assert_eq!(policy, Policy::default());
}

#[test]
fn the_record_of_the_readme_is_one() {
    let blocks = blocks(&read("README.md"), "json");
    assert_eq!(blocks.len(), 1);
    let key = "/services/shop/web/east/10.1.2.3:8080";
    let found = Format::Json
        .read("/services/", key.as_bytes(), blocks[0].trim().as_bytes())
        .unwrap();
    let endpoint = found.endpoint().expect("every member");
    let place = etcd_registrar::format::Place {
        prefix: "/services/",
    };
    let records = Format::Json.records(&place, &[endpoint]);
    assert_eq!(records[0].key, key);
    assert_eq!(
        String::from_utf8(records[0].value.clone()).unwrap(),
        blocks[0].trim()
    );
}

#[test]
fn the_value_of_a_lease_key_is_one() {
    let blocks = blocks(&read("docs/keys.md"), "json");
    assert_eq!(blocks.len(), 1);
    let name: SlotName = serde_json::from_str(&blocks[0]).unwrap();
    assert_eq!(serde_json::to_string(&name).unwrap(), blocks[0].trim());
}

#[test]
fn the_flags_are_those_of_run() {
    let cli = Cli::command();
    let run = cli.find_subcommand("run").unwrap();
    let flags: BTreeSet<(String, Option<String>)> = run
        .get_arguments()
        .filter_map(|argument| {
            let name = format!("--{}", argument.get_long()?);
            let default = argument.get_default_values().first();
            Some((
                name,
                default.map(|value| value.to_string_lossy().into_owned()),
            ))
        })
        .filter(|(name, _)| name != "--help")
        .collect();
    let documented: BTreeSet<(String, Option<String>)> = table(&read("README.md"), "Flags")
        .iter()
        .map(|row| {
            (
                quoted(&row[0]).unwrap().to_owned(),
                quoted(&row[1]).map(str::to_owned),
            )
        })
        .collect();
    assert_eq!(flags, documented);
}

#[test]
fn the_flags_named_anywhere_exist() {
    let known: Names = Cli::command()
        .get_subcommands()
        .flat_map(|command| command.get_arguments().cloned().collect::<Vec<_>>())
        .filter_map(|argument| Some(format!("--{}", argument.get_long()?)))
        .collect();
    let mut count = 0;
    for file in [
        "README.md",
        "docs/policy.md",
        "docs/discovery.md",
        "docs/keys.md",
        "docs/security.md",
        "docs/operations.md",
        "docs/registration.md",
        "docs/tools.md",
        "docs/from-tutorials.md",
        "deploy/README.md",
    ] {
        for line in read(file).lines() {
            // Commands of other programs have flags of their own.
            let command = [
                "run", "purge", "discover", "register", "tree", "diff", "doctor", "man",
            ]
            .iter()
            .find_map(|command| line.split_once(&format!("etcd-registrar {command} ")));
            let Some((_, command)) = command else {
                continue;
            };
            for flag in command
                .split_whitespace()
                // What follows is of the program that is registered.
                .take_while(|word| *word != "--")
                .filter(|word| word.starts_with("--"))
            {
                assert!(known.contains(flag), "{file}: {flag}");
                count += 1;
            }
        }
    }
    assert!(count >= 5, "{count} flags");
}

/// The names in `src/api/reason.rs`: of events, or of conditions and their reasons.
fn reasons(event: bool) -> Names {
    read("src/api/reason.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("pub const "))
        .filter(|line| line.starts_with("EVENT_") == event)
        .filter_map(|line| line.split('"').nth(1))
        .map(str::to_owned)
        .collect()
}

/// The first cells of a table.
fn first_cells(file: &str, heading: &str) -> Names {
    table(&read(file), heading)
        .iter()
        .map(|row| quoted(&row[0]).unwrap().to_owned())
        .collect()
}

#[test]
fn the_runbook_has_every_reason_and_every_metric() {
    let page = "docs/operations.md";
    let mut conditions = reasons(false);
    // The conditions themselves; `Accepted` is a reason, too.
    conditions.retain(|name| !matches!(&**name, "Ready" | "Conflict"));
    assert_eq!(first_cells(page, "Conditions"), conditions);
    assert_eq!(first_cells(page, "Events"), reasons(true));
    let metrics: Names = read("src/admin/metrics.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//! | `"))
        .flat_map(|row| {
            let cell = row.split(" | ").next().unwrap_or_default();
            cell.split(", ").map(str::to_owned).collect::<Vec<_>>()
        })
        .map(|name| {
            let name = name.trim_matches('`');
            name.split('{').next().unwrap_or_default().to_owned()
        })
        .collect();
    assert_eq!(first_cells(page, "Metrics"), metrics);
    // Those that alerts name exist.
    let text = read(page);
    let named = text.split("etcd_registrar_").skip(1).map(|rest| {
        rest.split(|c: char| !(c.is_ascii_lowercase() || c == '_'))
            .next()
            .unwrap_or_default()
    });
    for name in named.filter(|name| !name.is_empty()) {
        assert!(metrics.contains(name), "{name}");
    }
}

#[test]
fn the_rules_of_the_protocol_are_named_as_in_the_model() {
    let known: Names = ["Registrar", "Name"]
        .iter()
        .flat_map(|module| {
            let text = read(&format!("docs/protocol/{module}.tla"));
            let rules = text.split("G(\"").skip(1);
            rules
                .filter_map(|rest| rest.split('"').next())
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(first_cells("docs/protocol/README.md", "Rules"), known);
    // And each place in the code is there.
    for row in table(&read("docs/protocol/README.md"), "Rules") {
        let places = row[2].split('`').skip(1).step_by(2);
        for place in places.filter(|place| place.contains("::")) {
            let (file, function) = place.split_once("::").unwrap();
            let source = read(&format!("src/{file}.rs"));
            assert!(
                source.contains(&format!("fn {function}(")),
                "{place} is not there"
            );
        }
    }
}

#[test]
fn the_conditions_are_those_of_the_api() {
    let documented: Names = table(&read("README.md"), "Conditions")
        .iter()
        .flat_map(|row| [quoted(&row[0]), quoted(&row[2])])
        .flatten()
        .map(str::to_owned)
        .collect();
    assert_eq!(documented, reasons(false));
    assert!(reasons(true).contains("Registered"));
}

#[test]
fn the_folders_are_those_of_the_code_map() {
    let documented: Names = table(&read("ARCHITECTURE.md"), "Code map")
        .iter()
        .flat_map(|row| row[0].split('`').map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|name| Some(name.strip_prefix("src/")?.trim_end_matches('/').to_owned()))
        .collect();
    assert_eq!(documented, entries("src"));
}

#[test]
fn links_lead_somewhere() {
    let mut files: Vec<String> = entries(".")
        .into_iter()
        .chain(
            entries("docs")
                .into_iter()
                .map(|file| format!("docs/{file}")),
        )
        .filter(|file| file.ends_with(".md"))
        .collect();
    files.extend(
        [
            "examples/README.md",
            "deploy/README.md",
            "testbed/README.md",
            "docs/protocol/README.md",
        ]
        .map(String::from),
    );
    let mut count = 0;
    for file in &files {
        let text = read(file);
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap_or_default();
            if !link.starts_with("http") {
                let target = path(file).with_file_name(link.split('#').next().unwrap_or_default());
                assert!(target.exists(), "{file}: {link}");
                count += 1;
            }
        }
    }
    assert!(count > 10, "{count} links");
}

#[test]
fn the_targets_of_make_exist() {
    let makefile = read("Makefile");
    let mut count = 0;
    for file in ["README.md", "CONTRIBUTING.md"] {
        for line in read(file).lines() {
            let Some(target) = line
                .strip_prefix("    make ")
                .and_then(|rest| rest.split_whitespace().next())
                .filter(|target| *target != "#")
            else {
                continue;
            };
            assert!(
                makefile.contains(&format!("\n{target}:")),
                "{file}: make {target}"
            );
            count += 1;
        }
    }
    assert!(count >= 8, "{count} targets");
}

/// The tests of a file, by name.
fn tests_of(file: &str) -> Names {
    read(file)
        .split("#[test]\n")
        .skip(1)
        .filter_map(|rest| rest.split("fn ").nth(1)?.split('(').next())
        .map(|name| name.trim().to_owned())
        .collect()
}

#[test]
fn the_tests_that_the_table_of_faults_names_exist() {
    // In the table a test is what follows `cargo test --test`, or `--lib`: `TARGET NAME`, `TARGET MODULE::NAME`.
    let mut named = Names::new();
    for row in table(&read("docs/reliability.md"), "Faults") {
        let tests: Vec<&str> = row[1].split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "{row:?}");
        for test in tests {
            let (target, path) = test.split_once(' ').unwrap_or_else(|| panic!("{test}"));
            let (module, name) = path.rsplit_once("::").unwrap_or(("main", path));
            let module = module.replace("::", "/");
            let file = match target {
                // The tests of a module are in its file, or in one beside it.
                "lib" => ["", "/tests"]
                    .map(|end| module.trim_end_matches("/tests").to_owned() + end)
                    .map(|module| format!("src/{module}.rs"))
                    .into_iter()
                    .find(|file| {
                        std::path::Path::new(file).exists() && tests_of(file).contains(name)
                    })
                    .unwrap_or_else(|| panic!("{test}")),
                _ => format!("tests/{target}/{module}.rs"),
            };
            assert!(tests_of(&file).contains(name), "{test}");
            named.insert(test.to_owned());
        }
    }
    // And none of the fault tests is left out.
    for file in entries("tests/faults") {
        let module = file.trim_end_matches(".rs");
        for name in tests_of(&format!("tests/faults/{file}")) {
            let test = format!("faults {module}::{name}");
            assert!(named.contains(&test), "{test}");
        }
    }
}

#[test]
fn the_tests_that_the_page_on_discovery_names_exist() {
    let sources: Vec<String> = [
        "src/discovery/set_tests.rs",
        "src/discovery/source.rs",
        "src/registry/follower.rs",
        "tests/discovery/balance.rs",
        "tests/discovery/faults.rs",
        "tests/discovery/lists.rs",
    ]
    .map(read)
    .into();
    let rows = table(
        &read("docs/discovery.md"),
        "What is wrong with many readers, and not with this one",
    );
    assert!(rows.len() >= 8, "{} rows", rows.len());
    for row in rows {
        for test in row[1].split('`').skip(1).step_by(2) {
            let function = format!("fn {test}(");
            assert!(
                sources.iter().any(|source| source.contains(&function)),
                "{test}"
            );
        }
    }
}

#[test]
fn the_tests_that_the_pages_on_registration_name_exist() {
    let sources: Vec<String> = [
        "src/registration/tests.rs",
        "tests/registration/faults.rs",
        "tests/registration/keys.rs",
        "tests/tutorials.rs",
    ]
    .map(read)
    .into();
    let mut count = 0;
    for file in ["docs/registration.md", "docs/from-tutorials.md"] {
        let text = read(file);
        let words = text.split('`').skip(1).step_by(2);
        let tests = words.filter(|word| {
            word.matches('_').count() >= 3
                && word.chars().all(|c| c == '_' || c.is_ascii_lowercase())
        });
        for test in tests {
            let function = format!("fn {test}(");
            let found = sources.iter().any(|source| source.contains(&function));
            assert!(found, "{file}: {test}");
            count += 1;
        }
    }
    assert!(count >= 15, "{count} tests");
}
