//! What `make image` wrote: small, static, for nobody in particular, the same wherever it was built, and for two architectures.
//!
//! `make image-test` builds it and runs this; `cargo test` leaves it out.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use testbed::Etcd;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/image");
/// The first bytes of an ELF file of 64 bits, and where it names the machine.
const ELF: &[u8] = b"\x7fELF\x02\x01";
const MACHINE: usize = 18;
const ARCHITECTURES: [(&str, u8, &str); 2] = [("amd64", 62, ""), ("arm64", 183, "qemu-aarch64")];

fn binary(architecture: &str) -> PathBuf {
    Path::new(FOLDER)
        .join(architecture)
        .join("files/etcd-registrar")
}

fn archive(architecture: &str) -> PathBuf {
    let version = env!("CARGO_PKG_VERSION");
    Path::new(FOLDER).join(format!("etcd-registrar-{version}-{architecture}.tar"))
}

/// A file of an archive.
fn read(archive: &Path, file: &str) -> Vec<u8> {
    let mut tar = Command::new("tar");
    let output = tar
        .arg("--extract")
        .arg("--to-stdout")
        .arg("--file")
        .arg(archive)
        .arg(file);
    let output = output.output().unwrap();
    assert!(
        output.status.success(),
        "{file}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// The program of an architecture, run by this machine or by qemu; its folder is the root that it sees nothing of.
fn run(architecture: &str, emulator: &str, args: &[&str]) -> (Option<i32>, String) {
    let mut command = if emulator.is_empty() {
        Command::new(binary(architecture))
    } else {
        let mut command = Command::new(emulator);
        command.arg(binary(architecture));
        command
    };
    let output = command.args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[test]
#[ignore = "make image-test builds the image first"]
fn the_image_is_small_static_and_nobody_s() {
    for (architecture, machine, _) in ARCHITECTURES {
        let program = std::fs::read(binary(architecture)).unwrap();
        assert!(program.starts_with(ELF));
        assert_eq!(program[MACHINE], machine);
        // A dynamic one names its loader.
        let interpreter = b"/ld-";
        assert!(
            !program
                .windows(interpreter.len())
                .any(|part| part == interpreter)
        );
        // Nothing of the machine that built it.
        let here = [env!("CARGO_MANIFEST_DIR"), "/etcd-registrar/image/source"];
        for folder in here.into_iter().chain(["/.cargo/registry", "/.rustup/"]) {
            let folder = folder.as_bytes();
            assert!(!program.windows(folder.len()).any(|part| part == folder));
        }
        assert!(program.len() < 20 << 20, "{} bytes", program.len());

        let archive = archive(architecture);
        assert!(std::fs::metadata(&archive).unwrap().len() < 25 << 20);
        let manifest: Value = serde_json::from_slice(&read(&archive, "./manifest.json")).unwrap();
        let config = manifest[0]["Config"].as_str().unwrap();
        let config: Value =
            serde_json::from_slice(&read(&archive, &format!("./{config}"))).unwrap();
        assert_eq!(config["architecture"], architecture);
        assert_eq!(config["config"]["User"], "65532:65532");
        let labels = &config["config"]["Labels"];
        assert_eq!(
            labels["org.opencontainers.image.version"],
            env!("CARGO_PKG_VERSION")
        );
        assert!(labels["org.opencontainers.image.revision"].is_string());

        let components = Path::new(FOLDER)
            .join(architecture)
            .join("files/etcd-registrar.cdx.json");
        let components: Value =
            serde_json::from_slice(&std::fs::read(components).unwrap()).unwrap();
        assert_eq!(components["bomFormat"], "CycloneDX");
        let has = |name: &str| {
            components["components"]
                .as_array()
                .unwrap()
                .iter()
                .any(|one| one["name"] == name)
        };
        assert!(has("tokio") && has("ring"));
        // What only tests need is not in it.
        assert!(!has("proptest"));
    }
}

#[test]
#[ignore = "make image-test builds the image first"]
fn both_architectures_run() {
    let etcd = Etcd::builder("image").unsafe_no_fsync().start().unwrap();
    let value = r#"{"address":"10.1.2.3:8080","host":"10.1.2.3","port":8080,"portName":"http","protocol":"TCP","cluster":"east","namespace":"default","service":"web","pod":"web-0","uid":"u","weight":100}"#;
    etcd.etcdctl(&["put", "/services/default/web/east/10.1.2.3:8080", value])
        .unwrap();
    let endpoints = format!("--etcd-endpoints={}", etcd.endpoints_arg());
    for (architecture, _, emulator) in ARCHITECTURES {
        let (code, version) = run(architecture, emulator, &["--version"]);
        assert_eq!(code, Some(0), "{version}");
        assert!(
            version.contains("commit ") && version.contains(", static)"),
            "{version}"
        );
        assert!(!version.contains("unknown"), "{version}");
        let found = run(
            architecture,
            emulator,
            &["discover", "web", "-o", "addresses", &endpoints],
        );
        assert_eq!(
            found,
            (Some(0), "10.1.2.3:8080\n".to_owned()),
            "{architecture}"
        );
        // Without CA certificates, https needs a flag, and says so.
        let (code, said) = run(
            architecture,
            emulator,
            &[
                "discover",
                "web",
                "--timeout=2s",
                "--etcd-endpoints=https://127.0.0.1:1",
            ],
        );
        assert_eq!(code, Some(1), "{said}");
    }
}
