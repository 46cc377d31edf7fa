//! The commands `completions` and `man`: the argument definitions --> a script for a shell, pages for `man`.
//!
//! Takes the definitions of `cli`, gives text. Must never say anything of a flag that its definition does not.

use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;

/// The script that completes commands and flags in a shell.
#[must_use]
pub fn script(shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "etcd-registrar", &mut text);
    text
}

/// The page of the program, or of one of its commands.
///
/// # Errors
///
/// When there is no such command.
pub fn page(command: Option<&str>) -> Result<Vec<u8>, String> {
    let mut all = Cli::command();
    all.build();
    let found = match command {
        None => all,
        Some(name) => all
            .find_subcommand(name)
            .cloned()
            .ok_or_else(|| format!("there is no command {name:?}"))?,
    };
    render(found)
}

/// Writes the page of the program and of each of its commands into a folder.
///
/// # Errors
///
/// When a file can't be written.
pub fn write_pages(folder: &Path) -> Result<(), String> {
    let mut all = Cli::command();
    all.build();
    let commands: Vec<Command> = all.get_subcommands().cloned().collect();
    for command in std::iter::once(all).chain(commands) {
        let name = command.get_display_name().unwrap_or(command.get_name());
        let file = folder.join(format!("{}.1", name.replace(' ', "-")));
        std::fs::write(&file, render(command)?)
            .map_err(|error| format!("can't write {}: {error}", file.display()))?;
    }
    Ok(())
}

fn render(command: Command) -> Result<Vec<u8>, String> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command)
        .render(&mut text)
        .map_err(|error| format!("can't make the page: {error}"))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_its_flags() {
        let folder = tempfile::tempdir().unwrap();
        write_pages(folder.path()).unwrap();
        for command in Cli::command().get_subcommands() {
            let name = format!("etcd-registrar-{}.1", command.get_name());
            let text = std::fs::read_to_string(folder.path().join(&name)).unwrap();
            for argument in command.get_arguments() {
                if let Some(long) = argument.get_long() {
                    let flag = format!("\\-\\-{}", long.replace('-', "\\-"));
                    assert!(text.contains(&flag), "{name} lacks {flag}");
                }
            }
        }
        let whole = String::from_utf8(page(None).unwrap()).unwrap();
        assert!(whole.contains("etcd\\-registrar\\-discover(1)"), "{whole}");
        page(Some("nothing")).unwrap_err();
    }

    #[test]
    fn every_shell_completes_every_command() {
        for shell in [
            Shell::Bash,
            Shell::Zsh,
            Shell::Fish,
            Shell::Elvish,
            Shell::PowerShell,
        ] {
            let script = String::from_utf8(script(shell)).unwrap();
            for command in Cli::command().get_subcommands() {
                assert!(script.contains(command.get_name()), "{shell}");
            }
            assert!(script.contains("etcd-endpoints"), "{shell}");
        }
    }
}
