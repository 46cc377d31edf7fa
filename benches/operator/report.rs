//! The table, the JSON and the Markdown.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::Result;

/// The Markdown table stands between these two lines.
const BEGIN: &str = "<!-- the table of `make bench`: begin -->";
const END: &str = "<!-- the table of `make bench`: end -->";

/// A line of the table.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) operator: String,
    pub(crate) floor: Option<String>,
    pub(crate) ratio: Option<f64>,
    /// The same ratio between two halves of the floor: how much of `ratio` is noise.
    pub(crate) noise: Option<f64>,
    /// The floor with the operator's transactions against the floor: what those cost.
    pub(crate) fenced: Option<f64>,
    /// The same, with a watch of what is written: what the protocol costs, whoever speaks it.
    pub(crate) watched: Option<f64>,
    pub(crate) target: Option<String>,
    pub(crate) met: Option<bool>,
}

impl Row {
    pub(crate) fn new(what: impl Into<String>, operator: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            operator: operator.into(),
            floor: None,
            ratio: None,
            noise: None,
            fenced: None,
            watched: None,
            target: None,
            met: None,
        }
    }

    pub(crate) fn floor(mut self, floor: impl Into<String>, ratio: f64) -> Self {
        self.floor = Some(floor.into());
        self.ratio = Some(ratio);
        self
    }

    pub(crate) fn noise(mut self, noise: f64) -> Self {
        self.noise = Some(noise);
        self
    }

    pub(crate) fn protocol(mut self, fenced: f64, watched: f64) -> Self {
        self.fenced = Some(fenced);
        self.watched = Some(watched);
        self
    }

    pub(crate) fn target(mut self, target: impl Into<String>, met: bool) -> Self {
        self.target = Some(target.into());
        self.met = Some(met);
        self
    }

    fn cells(&self) -> [String; 9] {
        let ratio =
            |ratio: Option<f64>| ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let met = match self.met {
            Some(true) => "met",
            Some(false) => "not met",
            None => "",
        };
        [
            self.what.clone(),
            self.operator.clone(),
            self.floor.clone().unwrap_or_default(),
            ratio(self.ratio),
            ratio(self.noise),
            ratio(self.fenced),
            ratio(self.watched),
            self.target.clone().unwrap_or_default(),
            met.to_owned(),
        ]
    }
}

const HEAD: [&str; 9] = [
    "what",
    "operator",
    "floor",
    "ratio",
    "floor / floor",
    "fenced / floor",
    "fenced and watched / floor",
    "target",
    "",
];

/// What it was measured on.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    date: String,
    processor: String,
    cores: usize,
    memory_gib: u64,
    kernel: String,
    /// The load before the run: what else the machine was doing.
    load: String,
    kubernetes: String,
    etcd: String,
    quick: bool,
}

impl Machine {
    pub(crate) fn new(quick: bool) -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            text.lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once(':'))
                .map(|(_, value)| value.trim().to_owned())
                .unwrap_or_default()
        };
        let memory: u64 = field(&read("/proc/meminfo"), "MemTotal")
            .trim_end_matches(" kB")
            .parse()
            .unwrap_or(0);
        let version = |program: &str, argument: &str| -> Result<String> {
            let output = std::process::Command::new(testbed::tools::path(program)?)
                .arg(argument)
                .output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            let first = text.lines().next().unwrap_or_default();
            Ok(first.rsplit(' ').next().unwrap_or_default().to_owned())
        };
        Ok(Self {
            date: k8s_openapi::jiff::Timestamp::now()
                .to_string()
                .chars()
                .take(10)
                .collect(),
            processor: field(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism()?.get(),
            memory_gib: memory.div_ceil(1 << 20),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
            kubernetes: version("kube-apiserver", "--version")?,
            etcd: version("etcd", "--version")?,
            quick,
        })
    }

    fn text(&self) -> String {
        format!(
            "{}: {} cores of {}, {} GiB of memory, Linux {}, Kubernetes {}, etcd {}; load before the run: {}{}",
            self.date,
            self.cores,
            self.processor,
            self.memory_gib,
            self.kernel,
            self.kubernetes,
            self.etcd,
            self.load,
            if self.quick { "; a quick run" } else { "" },
        )
    }
}

/// What the run gave.
pub(crate) struct Report {
    machine: Machine,
    rows: Vec<Row>,
    folder: PathBuf,
}

impl Report {
    pub(crate) fn new(machine: Machine) -> Result<Self> {
        // Cargo names `target/tmp`, wherever `target` is.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench");
        std::fs::create_dir_all(&folder)?;
        Ok(Self {
            machine,
            rows: Vec::new(),
            folder,
        })
    }

    /// Takes the rows of a part, and writes them with whatever was measured to its JSON file.
    pub(crate) fn add(
        &mut self,
        part: &str,
        rows: Vec<Row>,
        measured: &serde_json::Value,
    ) -> Result<()> {
        let file = self.folder.join(format!("{part}.json"));
        let all = serde_json::json!({"machine": self.machine, "rows": rows, "measured": measured});
        std::fs::write(&file, serde_json::to_string_pretty(&all)?)?;
        eprintln!("bench: wrote {}", file.display());
        self.rows.extend(rows);
        Ok(())
    }

    /// The table for a terminal.
    pub(crate) fn text(&self) -> String {
        let mut table = vec![HEAD.map(str::to_owned)];
        table.extend(self.rows.iter().map(Row::cells));
        let widths: Vec<usize> = (0..HEAD.len())
            .map(|column| {
                let cells = table.iter().filter_map(|row| row.get(column));
                cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
            })
            .collect();
        let mut text = format!("\n{}\n\n", self.machine.text());
        for row in table {
            let cells = row
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{cell:width$}"));
            let line = cells.collect::<Vec<_>>().join("  ");
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }

    /// Replaces the table in a Markdown file.
    pub(crate) fn write_markdown(&self, file: &Path) -> Result<()> {
        let text = std::fs::read_to_string(file)?;
        let marks = format!("{} has no lines {BEGIN} and {END}", file.display());
        let (before, rest) = text.split_once(BEGIN).ok_or_else(|| marks.clone())?;
        let (_, after) = rest.split_once(END).ok_or(marks)?;
        let mut table = format!("{}.\n\n", self.machine.text());
        let mut line = |cells: &[String]| {
            let _ = writeln!(table, "| {} |", cells.join(" | "));
        };
        line(&HEAD.map(str::to_owned));
        line(&["---", "---:", "---:", "---:", "---:", "---", "---"].map(str::to_owned));
        for row in &self.rows {
            line(&row.cells());
        }
        std::fs::write(file, format!("{before}{BEGIN}\n{table}{END}{after}"))?;
        eprintln!("bench: wrote the table to {}", file.display());
        Ok(())
    }
}

/// A duration in milliseconds as the table shows it.
pub(crate) fn shown(milliseconds: f64) -> String {
    if milliseconds.abs() < 100.0 {
        format!("{milliseconds:.2} ms")
    } else if milliseconds.abs() < 10_000.0 {
        format!("{milliseconds:.0} ms")
    } else {
        format!("{:.1} s", milliseconds / 1000.0)
    }
}
