//! Registers an address for as long as the program runs, and says how that goes:
//!
//!     cargo run --no-default-features --features discovery --example register -- shop web 10.0.0.5:8080

use std::time::Duration;

use etcd_registrar::registration::{Instance, Registrar, Settings, State};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(namespace), Some(service), Some(address)) = (args.next(), args.next(), args.next())
    else {
        return Err("give a namespace, the name of a service, and an address".into());
    };
    let registrar = Registrar::connect(Settings {
        endpoints: vec!["http://127.0.0.1:2379".to_owned()],
        ..Settings::default()
    })
    .await?;
    let instance = Instance::new("vm", &namespace, &service, address.parse()?)?;
    let registration = registrar.register(Duration::from_secs(15), [instance])?;
    println!("{}", registration.keys().join(" "));
    // A real one would serve meanwhile, and call `close` when it is to end.
    let mut state = registration.state();
    while state != State::Closed {
        println!("{state:?}");
        state = registration.state_other_than(&state).await;
    }
    Ok(())
}
