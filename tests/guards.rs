//! The guards of the protocol, taken out one at a time: some test has to fail for each.
//!
//! Takes `tests/data/guards.yaml`. `cargo test` shows that every guard is still where the list says; `make mutants`
//! makes a copy of the tree in which an environment variable takes a guard out, builds it once, and runs the tests
//! once for each guard. A guard is killed by a test that fails without it, fails so again, and passes with all guards
//! in over the same seeds; that tests end early, hang or are not there kills nothing, and is told. Must never change
//! the tree itself.

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
/// What one run of tests may take: several times what it takes with all guards in.
const LONGEST: Duration = Duration::from_secs(600);

/// The tests of the simulation whose schedules were made by hand.
const DIRECTED: &str = "directed::";

/// Characters of what a test said that are shown.
const SHOWN: usize = 100;

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
    // `GUARDS` names some, separated by commas.
    assert!(names.iter().all(|name| !name.contains(',')));
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
        // The simulation runs dozens of times: what is of this project is optimised, at least.
        .args(["--config", "profile.dev.opt-level=1"])
        .args(["--config", "profile.dev.package.\"*\".opt-level=0"])
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

/// What a run of tests showed.
enum Outcome {
    /// All passed: these.
    Passed(BTreeSet<String>),
    /// A test failed.
    Failed {
        test: String,
        /// Its first words, where the run was to go on to its end.
        why: String,
    },
    /// Neither: it did not end, or not as tests end.
    Odd(String),
}

/// Which tests are run, and how.
#[derive(Clone, Copy)]
struct Run<'a> {
    program: &'a Path,
    tree: &'a Path,
    name: &'a str,
    /// One test, that has just this name: it runs to its end, and says why it fails.
    exactly: bool,
    /// How many seeds of every class of the simulation; `None`: as many as in `make test`.
    seeds: Option<&'a str>,
}

impl Run<'_> {
    fn start(&self, out: Option<&str>) -> Running {
        let directed = self.name.starts_with(DIRECTED);
        let mut command = Command::new(self.program);
        command
            .current_dir(self.tree)
            .arg(self.name)
            .args(self.exactly.then_some("--exact"))
            // These test the simulation itself.
            .args(["--skip", "real_etcd", "--skip", "replay"])
            // Each of these is for the guards that name it; without others it may not come to what it shows.
            .args(
                (!directed)
                    .then_some(["--skip", DIRECTED])
                    .into_iter()
                    .flatten(),
            )
            .env("SHRINK", "no")
            .env_remove("SEEDS")
            .envs(self.seeds.map(|seeds| ("SEEDS", seeds)))
            .env_remove("SEED")
            .env_remove("RUST_BACKTRACE")
            .env_remove(VARIABLE)
            .envs(out.map(|name| (VARIABLE, name)))
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        Running(command.spawn().unwrap())
    }

    /// Runs the tests with a guard out, or with none.
    fn outcome(&self, out: Option<&str>) -> Outcome {
        let mut running = self.start(out);
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
        let mut passed = BTreeSet::new();
        let mut failed: Option<String> = None;
        let mut after_failure: Vec<String> = Vec::new();
        let mut whole = false;
        loop {
            let line = match said.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Outcome::Odd(format!("no end after {} s", LONGEST.as_secs()));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            };
            if failed.is_some() {
                after_failure.push(line);
                continue;
            }
            whole |= line.starts_with("test result: ok.");
            let Some((test, result)) = line
                .strip_prefix("test ")
                .and_then(|rest| rest.split_once(" ... "))
            else {
                continue;
            };
            match result {
                "ok" => {
                    passed.insert(test.to_owned());
                }
                "FAILED" => {
                    failed = Some(test.to_owned());
                    if !self.exactly {
                        break;
                    }
                }
                _ => {}
            }
        }
        if let Some(test) = failed {
            let why = why(&after_failure);
            return Outcome::Failed { test, why };
        }
        let status = running.0.wait().unwrap();
        if whole && status.success() {
            Outcome::Passed(passed)
        } else {
            Outcome::Odd(format!("the tests end early: {status}"))
        }
    }
}

/// What the test said that failed.
fn why(said: &[String]) -> String {
    let panicked = said.iter().position(|line| line.contains(" panicked at "));
    let message = panicked.and_then(|at| said.get(at + 1));
    let message = message.map_or("", String::as_str);
    message.chars().take(SHOWN).collect()
}

/// The programs of the copied tree, and which tests pass there with all guards in.
struct Tree {
    folder: PathBuf,
    programs: BTreeMap<String, PathBuf>,
    passing: BTreeMap<(Tests, Option<&'static str>), BTreeSet<String>>,
}

impl Tree {
    fn run<'a>(&'a self, tests: &'a Tests, seeds: Option<&'static str>) -> Run<'a> {
        Run {
            program: &self.programs[&tests.target],
            tree: &self.folder,
            name: &tests.name,
            exactly: false,
            seeds,
        }
    }

    /// The tests that pass with all guards in, over these seeds: all of them.
    fn passing(&mut self, tests: &Tests, seeds: Option<&'static str>) -> BTreeSet<String> {
        let key = (tests.clone(), seeds);
        if let Some(known) = self.passing.get(&key) {
            return known.clone();
        }
        let passed = match self.run(tests, seeds).outcome(None) {
            Outcome::Passed(passed) => passed,
            Outcome::Failed { test, .. } => panic!("with all guards in, {test} fails"),
            Outcome::Odd(how) => panic!("with all guards in, {tests:?}: {how}"),
        };
        assert!(!passed.is_empty(), "no test is named {tests:?}");
        self.passing.insert(key, passed.clone());
        passed
    }

    /// The test that fails without a guard and what it says; or why it is not known that one does.
    fn killer(
        &mut self,
        guard: &str,
        tests: &Tests,
        seeds: Option<&'static str>,
    ) -> Result<String, String> {
        let passing = self.passing(tests, seeds);
        let run = self.run(tests, seeds);
        match run.outcome(Some(guard)) {
            Outcome::Failed { test, .. } => {
                assert!(passing.contains(&test), "{test} is new");
                let again = Run {
                    name: &test,
                    exactly: true,
                    ..run
                };
                match again.outcome(Some(guard)) {
                    Outcome::Failed { why, .. } => Ok(format!("{}: {test}: {why}", tests.target)),
                    Outcome::Passed(_) => Err(format!("{test} fails once, and not again")),
                    Outcome::Odd(how) => Err(format!("{test} fails once, and then: {how}")),
                }
            }
            Outcome::Passed(passed) if passed == passing => Err("no test fails".into()),
            Outcome::Passed(_) => Err("other tests run than with all guards in".into()),
            Outcome::Odd(how) => Err(how),
        }
    }
}

#[test]
#[ignore = "make mutants: takes minutes"]
fn no_guard_can_be_taken_out_unseen() {
    let guards = guards();
    let wanted = std::env::var("GUARDS").unwrap_or_default();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guards/tree");
    copy(root(), &folder, &files(&guards));
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
    assert!(
        wanted.is_empty() || chosen.len() == wanted.split(',').count(),
        "GUARDS names what is not in the list"
    );
    let targets = chosen
        .iter()
        .flat_map(|guard| tests_of(guard))
        .map(|tests| tests.target)
        .collect();
    let mut tree = Tree {
        programs: build(&folder, &targets),
        folder,
        passing: BTreeMap::new(),
    };
    println!("{:<34} {:>6}  killed by", "guard", "s");
    let mut alive = Vec::new();
    for guard in &chosen {
        let began = Instant::now();
        let mut killer = Err(String::new());
        // A few seeds of every class show most of them.
        for (seeds, tests) in [Some(FEW), None]
            .into_iter()
            .flat_map(|seeds| tests_of(guard).into_iter().map(move |tests| (seeds, tests)))
        {
            killer = tree.killer(&guard.name, &tests, seeds);
            if killer.is_ok() {
                break;
            }
        }
        let told = match &killer {
            Ok(killer) => killer.clone(),
            Err(why) => format!("NOT KILLED: {why}"),
        };
        let took = began.elapsed().as_secs_f64();
        println!("{:<34} {took:>6.1}  {told}", guard.name);
        if let Err(why) = killer {
            alive.push(format!("{} ({}): {why}", guard.name, guard.breaks));
        }
    }
    println!(
        "{} guards, {} killed",
        chosen.len(),
        chosen.len() - alive.len()
    );
    assert!(alive.is_empty(), "no test fails without: {alive:#?}");
}
