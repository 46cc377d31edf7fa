//! The guards of the protocol, taken out one at a time: some test has to fail for each.
//!
//! Takes `tests/data/guards.yaml`. `cargo test` shows that every guard is still where the list says; `make mutants`
//! makes a copy of the tree in which an environment variable takes a guard out, builds it once, and runs the tests
//! once for each guard. Must never change the tree itself.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::Deserialize;

/// The variable that names the guard that is out.
const VARIABLE: &str = "GUARD_OUT";
/// What the tests of one guard may take: several times what they take with all guards in. A run that does not
/// end has shown that the guard is missed.
const LONGEST: Duration = Duration::from_secs(600);

/// Seeds of every class of the simulation that are tried first.
const FEW: &str = "25";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Guard {
    /// The name of the rule, that of `docs/protocol/` where it has one.
    name: String,
    /// What goes wrong without it.
    breaks: String,
    edits: Vec<Edit>,
    /// The tests that have to see it; those of the simulation where none are named.
    #[serde(default)]
    tests: Vec<Tests>,
    /// Why nothing breaks, where another guard does the same: then it is only looked for.
    #[serde(default)]
    covered: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Edit {
    file: String,
    /// The first place after this text is meant; white space does not matter, here and below.
    #[serde(default)]
    after: String,
    find: String,
    #[serde(default)]
    replace: String,
}

/// Tests of one target; all of them where no name is given.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(deny_unknown_fields)]
struct Tests {
    target: String,
    #[serde(default)]
    name: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn guards() -> Vec<Guard> {
    let text = fs::read_to_string(root().join("tests/data/guards.yaml")).unwrap();
    serde_yaml::from_str(&text).expect("tests/data/guards.yaml")
}

/// Where `wanted` stands in `text` from `from` on, whatever white space is between its words.
fn find(text: &str, wanted: &str, from: usize) -> Option<(usize, usize)> {
    let wanted: Vec<char> = wanted.chars().filter(|c| !c.is_whitespace()).collect();
    let rest: Vec<(usize, char)> = text[from..]
        .char_indices()
        .filter(|(_, c)| !c.is_whitespace())
        .collect();
    let at = rest
        .windows(wanted.len().max(1))
        .position(|window| window.iter().map(|(_, c)| c).eq(&wanted))?;
    let (start, _) = rest[at];
    let (last, c) = rest[at + wanted.len() - 1];
    Some((from + start, from + last + c.len_utf8()))
}

/// The place of an edit, or what is wrong with it.
fn place(edit: &Edit, text: &str) -> Result<(usize, usize), String> {
    let from = if edit.after.is_empty() {
        0
    } else {
        let (_, end) = find(text, &edit.after, 0)
            .ok_or_else(|| format!("{}: {:?} is not there any more", edit.file, edit.after))?;
        end
    };
    let found = find(text, &edit.find, from)
        .ok_or_else(|| format!("{}: {:?} is not there any more", edit.file, edit.find))?;
    if edit.after.is_empty() && find(text, &edit.find, found.1).is_some() {
        return Err(format!(
            "{}: {:?} is there more than once: say after what",
            edit.file, edit.find
        ));
    }
    Ok(found)
}

/// A file in which each guard can be taken out.
fn switched(text: &str, edits: &[(&str, &Edit)]) -> Result<String, String> {
    let mut places: BTreeMap<(usize, usize), Vec<(&str, &Edit)>> = BTreeMap::new();
    for (name, edit) in edits {
        places
            .entry(place(edit, text)?)
            .or_default()
            .push((name, edit));
    }
    let mut out = String::new();
    let mut copied = 0;
    for ((start, end), edits) in places {
        if start < copied {
            return Err(format!("{:?} overlaps with another guard", edits[0].1.find));
        }
        out.push_str(&text[copied..start]);
        let original = &text[start..end];
        // A statement, or an expression anywhere.
        let statement = original.ends_with(';');
        if !statement {
            out.push('(');
        }
        for (name, edit) in edits {
            let _ = write!(
                out,
                "if crate::guard_is_out({name:?}) {{ {} }} else ",
                edit.replace
            );
        }
        let _ = write!(out, "{{ {original} }}");
        if !statement {
            out.push(')');
        }
        copied = end;
    }
    out.push_str(&text[copied..]);
    Ok(out)
}

/// All files with guards, as they are with the switches.
fn files(guards: &[Guard]) -> BTreeMap<String, String> {
    let mut by_file: BTreeMap<&str, Vec<(&str, &Edit)>> = BTreeMap::new();
    for guard in guards {
        for edit in &guard.edits {
            by_file
                .entry(&edit.file)
                .or_default()
                .push((&guard.name, edit));
        }
    }
    let mut wrong = Vec::new();
    let mut found = BTreeMap::new();
    for (file, edits) in by_file {
        let text = fs::read_to_string(root().join(file)).unwrap();
        match switched(&text, &edits) {
            Ok(text) => {
                found.insert(file.to_owned(), text);
            }
            Err(why) => wrong.push(why),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    found
}

#[test]
fn every_guard_is_where_the_list_says() {
    let guards = guards();
    let names: BTreeSet<&str> = guards.iter().map(|guard| guard.name.as_str()).collect();
    assert_eq!(names.len(), guards.len(), "names are unique");
    assert!(
        guards
            .iter()
            .all(|guard| !guard.edits.is_empty() && !guard.breaks.is_empty())
    );
    assert!(!files(&guards).is_empty());
}

/// Copies the tree; a file that is the same already keeps its time, so that little is built anew.
fn copy(from: &Path, to: &Path, changed: &BTreeMap<String, String>) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        let path = entry.path();
        if from == root() && (name == "target" || name == ".git") {
            continue;
        }
        if path.is_dir() {
            copy(&path, &to.join(name), changed);
            continue;
        }
        let relative = path.strip_prefix(root()).unwrap();
        let mut content = match changed.get(relative.to_str().unwrap()) {
            Some(text) => text.clone().into_bytes(),
            None => fs::read(&path).unwrap(),
        };
        if relative == Path::new("src/lib.rs") {
            // The brackets around an expression are not always needed.
            content.splice(0..0, *b"#![allow(unused_parens)]\n");
            content.extend_from_slice(SWITCH.replace("VARIABLE", VARIABLE).as_bytes());
        }
        let target = to.join(name);
        if fs::read(&target).is_ok_and(|there| there == content) {
            continue;
        }
        fs::create_dir_all(to).unwrap();
        fs::write(&target, content).unwrap();
    }
}

const SWITCH: &str = r#"
#[doc(hidden)]
pub fn guard_is_out(name: &str) -> bool {
    static OUT: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    OUT.get_or_init(|| std::env::var("VARIABLE").ok()).as_deref() == Some(name)
}
"#;

/// Builds the tests of these targets; gives the program of each.
fn build(tree: &Path, targets: &BTreeSet<String>) -> BTreeMap<String, PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(tree)
        .args([
            "test",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
        .arg("--target-dir")
        .arg(tree.with_file_name("target"))
        .stderr(Stdio::inherit());
    for target in targets {
        if target == "lib" {
            cargo.arg("--lib");
        } else {
            cargo.args(["--test", target]);
        }
    }
    let built = cargo.output().unwrap();
    assert!(built.status.success(), "the tree with switches builds");
    let mut programs = BTreeMap::new();
    for line in built.stdout.lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(&line.unwrap()) else {
            continue;
        };
        if let (Some(program), Some(name)) = (
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
        ) {
            let is_lib = message["target"]["kind"][0] == "lib";
            let name = if is_lib { "lib" } else { name };
            programs.insert(name.to_owned(), PathBuf::from(program));
        }
    }
    programs
}

/// Ends with what it waits for.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs tests with a guard out (or none), those of the simulation with so many seeds; the first test that fails, if
/// one does.
fn first_failure(
    program: &Path,
    tree: &Path,
    tests: &Tests,
    out: Option<&str>,
    seeds: Option<&str>,
) -> Option<String> {
    let mut command = Command::new(program);
    command
        .current_dir(tree)
        .arg(&tests.name)
        // These test the simulation itself.
        .args(["--skip", "real_etcd", "--skip", "replay"])
        .env("SHRINK", "no")
        .env_remove("SEEDS")
        .envs(seeds.map(|seeds| ("SEEDS", seeds)))
        .env_remove(VARIABLE)
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if let Some(name) = out {
        command.env(VARIABLE, name);
    }
    let mut running = Running(command.spawn().unwrap());
    let stdout = running.0.stdout.take().unwrap();
    let (lines, said) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    let end = Instant::now() + LONGEST;
    let mut ran = false;
    loop {
        match said.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                let test = line
                    .strip_prefix("test ")
                    .and_then(|rest| rest.split(' ').next());
                if let Some(name) = test
                    && line.ends_with("FAILED")
                {
                    return Some(name.to_owned());
                }
                ran |= test.is_some() && line.ends_with("ok");
            }
            Err(mpsc::RecvTimeoutError::Timeout) => return Some("the tests do not end".into()),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    let passed = running.0.wait().unwrap().success();
    assert!(ran || !passed, "no test is named {tests:?}");
    (!passed).then(|| "the tests end early".into())
}

#[test]
#[ignore = "make mutants: takes minutes"]
fn no_guard_can_be_taken_out_unseen() {
    let guards = guards();
    let wanted = std::env::var("GUARDS").unwrap_or_default();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guards");
    let tree = folder.join("tree");
    copy(root(), &tree, &files(&guards));
    let tests_of = |guard: &Guard| {
        if guard.tests.is_empty() {
            vec![Tests {
                target: "simulation".into(),
                name: String::new(),
            }]
        } else {
            guard.tests.clone()
        }
    };
    let chosen: Vec<&Guard> = guards
        .iter()
        .filter(|guard| wanted.is_empty() || wanted.split(',').any(|name| name == guard.name))
        .collect();
    assert!(!chosen.is_empty(), "GUARDS names none of the list");
    let tests: BTreeSet<Tests> = chosen.iter().flat_map(|guard| tests_of(guard)).collect();
    let targets = tests.iter().map(|tests| tests.target.clone()).collect();
    let programs = build(&tree, &targets);
    for tests in &tests {
        let failed = first_failure(&programs[&tests.target], &tree, tests, None, Some(FEW));
        assert_eq!(failed, None, "with all guards in, {tests:?} passes");
    }
    println!("{:<34} {:>6}  killed by", "guard", "s");
    let mut survivors = Vec::new();
    for guard in chosen {
        if let Some(why) = &guard.covered {
            println!("{:<34} {:>6}  (none: {why})", guard.name, "");
            continue;
        }
        let began = Instant::now();
        let tests = tests_of(guard);
        // A few seeds of every class show most of them.
        let killer = [Some(FEW), None].into_iter().find_map(|seeds| {
            tests.iter().find_map(|tests| {
                let program = &programs[&tests.target];
                let failed = first_failure(program, &tree, tests, Some(&guard.name), seeds)?;
                Some(format!("{}: {failed}", tests.target))
            })
        });
        println!(
            "{:<34} {:>6.1}  {}",
            guard.name,
            began.elapsed().as_secs_f64(),
            killer.as_deref().unwrap_or("SURVIVES")
        );
        if killer.is_none() {
            survivors.push(format!("{}: {}", guard.name, guard.breaks));
        }
    }
    assert!(
        survivors.is_empty(),
        "no test fails without: {survivors:#?}"
    );
}
