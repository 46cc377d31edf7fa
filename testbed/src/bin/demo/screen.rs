//! What the demo prints: headings, sentences, commands, output and checks; with colours on a terminal only.

use std::io::IsTerminal;

/// How long a line of prose may become.
const WIDTH: usize = 100;

/// Where the demo prints to.
#[derive(Clone, Copy)]
pub(crate) struct Screen {
    colours: bool,
}

impl Screen {
    /// Standard output. `NO_COLOR` is respected (<https://no-color.org>).
    pub(crate) fn new() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            colours: std::io::stdout().is_terminal() && !unwanted,
        }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// The beginning of a step.
    pub(crate) fn heading(self, text: &str) {
        println!("\n{}", self.paint("1;36", &format!("=== {text} ===")));
    }

    /// A sentence for the reader.
    pub(crate) fn say(self, text: &str) {
        println!();
        for line in wrapped(text, WIDTH) {
            println!("{line}");
        }
    }

    /// A command as it can be copied.
    pub(crate) fn command(self, command: &str) {
        println!("\n{} {}", self.paint("2", "$"), self.paint("1", command));
    }

    /// What a command printed, without the blank lines that etcdctl puts between keys.
    pub(crate) fn output(self, text: &str) {
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            println!("  {}", line.trim_end());
        }
    }

    /// A line of the watcher that runs beside the commands.
    pub(crate) fn watcher(self, text: &str) {
        println!("  {} {text}", self.paint("33", "watcher:"));
    }

    /// What was expected, and has been seen.
    pub(crate) fn seen(self, text: &str) {
        println!("  {} {text}", self.paint("32", "ok:"));
    }

    /// What goes on while one has to wait.
    pub(crate) fn progress(self, text: &str) {
        println!("  {}", self.paint("2", text));
    }
}

/// Lines of at most `width` characters, broken at blanks.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_is_broken_at_blanks() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("a-long-word b", 4), ["a-long-word", "b"]);
        assert!(wrapped("", 5).is_empty());
    }
}
