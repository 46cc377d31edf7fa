//! The table of docs/formats.md: takes what was measured, gives Markdown. Must never make up a cell.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::client::Kind;

/// The table stands between these two lines.
const BEGIN: &str = "<!-- the table of `make interop`: begin -->";
const END: &str = "<!-- the table of `make interop`: end -->";

/// What was measured of one client: a cell by the column's name.
pub(crate) type Cells = BTreeMap<&'static str, String>;

/// The version of a module in a go.mod.
fn version(manifest: &str, module: &str) -> String {
    let found = manifest.lines().find_map(|line| {
        let line = line.trim().trim_start_matches("require ");
        line.strip_prefix(module)?.strip_prefix(' ')
    });
    let version = found.and_then(|rest| rest.split_whitespace().next());
    version.unwrap_or_else(|| panic!("{module}")).to_owned()
}

/// The versions of the modules that a client is made of.
pub(crate) fn versions(kind: &Kind) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop");
    let manifest = std::fs::read_to_string(folder.join(kind.folder).join("go.mod")).unwrap();
    let each = kind.modules.iter().map(|(module, name)| {
        let version = version(&manifest, module);
        // A version without a tag ends in a date and a hash, and the date tells more.
        let untagged = version.split_once(".0.0-").and_then(|(_, rest)| {
            let (year, month, day) = (rest.get(..4)?, rest.get(4..6)?, rest.get(6..8)?);
            Some(format!("of {year}-{month}-{day}"))
        });
        let version = untagged.unwrap_or_else(|| version.trim_start_matches('v').to_owned());
        format!("{name} {version}").trim().to_owned()
    });
    each.collect::<Vec<_>>().join(", ")
}

/// The time from a change in etcd to the list of a client, as the table shows it.
pub(crate) fn shown(microseconds: i64) -> String {
    // Half of the clients are asked every 50 ms, so that less than twice that tells nothing of them.
    match microseconds / 100_000 {
        ..1 => "below 0.1 s".to_owned(),
        tenths => format!("{}.{} s", tenths / 10, tenths % 10),
    }
}

fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("", |(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    let date = now.get(..10).unwrap_or_default();
    format!("Measured on {date}: {cores} cores of {model}.")
}

/// The whole table.
pub(crate) fn markdown(columns: &[&'static str], rows: &[(&'static Kind, Cells)]) -> String {
    let mut text = format!("{}\n\n", machine());
    let mut line = |cells: Vec<String>| {
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    };
    let head = ["client", "version"].iter().chain(columns);
    line(head.clone().map(|cell| (*cell).to_owned()).collect());
    line(head.map(|_| "---".to_owned()).collect());
    for (kind, cells) in rows {
        let mut row = vec![kind.name.to_owned(), versions(kind)];
        row.extend(columns.iter().map(|column| cells[column].clone()));
        line(row);
    }
    text
}

/// Replaces the table in a Markdown file.
pub(crate) fn write(file: &Path, table: &str) {
    let text = std::fs::read_to_string(file).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    std::fs::write(file, format!("{before}{BEGIN}\n{table}{END}{after}")).unwrap();
    eprintln!("interop: wrote the table to {}", file.display());
}
