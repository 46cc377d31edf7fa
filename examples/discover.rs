//! Follows a service and prints what joins and leaves:
//!
//!     cargo run --no-default-features --features discovery --example discover -- shop web

use etcd_registrar::discovery::{Change, Discovery, Settings, Source};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(namespace), Some(service)) = (args.next(), args.next()) else {
        return Err("give the namespace and the name of a service".into());
    };
    let discovery = Discovery::connect(Settings {
        endpoints: vec!["http://127.0.0.1:2379".to_owned()],
        ..Settings::default()
    })
    .await?;
    let list = discovery.follow(Source::service(&namespace, &service)?);
    let mut changes = list.changes();
    while let Some(change) = changes.next().await {
        match change {
            Change::Added(endpoint) => println!("+ {}", endpoint.url()),
            Change::Changed { after, .. } => println!("~ {}", after.url()),
            Change::Removed(endpoint) => println!("- {}", endpoint.url()),
        }
    }
    Ok(())
}
