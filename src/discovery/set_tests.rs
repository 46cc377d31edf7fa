//! That the list is what stands in etcd, whatever came before, and that readers of changes have it, too.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::format::Format;

/// What stands in a model of etcd.
type Store = BTreeMap<String, (String, Revision)>;

fn record(key: &str, (value, revision): &(String, Revision)) -> KeyValue {
    KeyValue {
        key: key.as_bytes().into(),
        value: value.as_bytes().into(),
        lease: 0,
        create_revision: *revision,
        mod_revision: *revision,
    }
}

fn all(store: &Store) -> Vec<KeyValue> {
    store.iter().map(|(key, held)| record(key, held)).collect()
}

/// What should be in the list, found out without it: ids and endpoints.
fn expected(source: &Source, store: &Store) -> BTreeMap<Id, Endpoint> {
    store
        .iter()
        .filter_map(|(key, (value, _))| {
            let told = source
                .format
                .read_all(&source.prefix, key.as_bytes(), value.as_bytes());
            Some((Arc::<str>::from(key.as_str()), told.ok()?))
        })
        .flat_map(|(key, told)| {
            told.into_iter()
                .map(move |told| Endpoint::new(&key, told))
                .collect::<Vec<_>>()
        })
        .filter(|endpoint| source.wants(endpoint))
        .map(|endpoint| (endpoint.id().clone(), endpoint))
        .collect()
}

fn listed(set: &Set) -> BTreeMap<Id, Endpoint> {
    set.endpoints()
        .into_iter()
        .map(|endpoint| (endpoint.id().clone(), (*endpoint).clone()))
        .collect()
}

/// Who applies changes and trusts them.
#[derive(Default)]
struct Reader {
    pending: Pending,
    list: BTreeMap<Id, Endpoint>,
}

impl Reader {
    fn take(&mut self) {
        for change in self.pending.take() {
            let id = change.endpoint().id().clone();
            match change {
                Change::Added(endpoint) => {
                    assert_eq!(self.list.insert(id, (*endpoint).clone()), None);
                }
                Change::Changed { before, after } => {
                    assert_ne!(before, after);
                    let known = self.list.insert(id, (*after).clone());
                    assert_eq!(known.as_ref(), Some(&*before));
                }
                Change::Removed(endpoint) => {
                    assert_eq!(self.list.remove(&id).as_ref(), Some(&*endpoint));
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A put that the watch delivers.
    Put(usize, usize),
    /// A delete that the watch delivers.
    Delete(usize),
    /// Puts and deletes of which nothing is heard: the connection is lost.
    Unheard(Vec<(usize, Option<usize>)>),
    /// All is gone, and the revisions begin anew.
    Wipe,
    /// The list is read.
    Read,
    /// A reader takes what there is.
    Take(usize),
}

/// Keys and values of a format, among them some that nobody can read.
fn choices(format: &Format) -> (Vec<String>, Vec<String>) {
    let json = |address: &str, zone: &str, weight: u32| {
        let (host, port) = address.rsplit_once(':').unwrap();
        format!(
            r#"{{"address":"{address}","host":"{host}","port":{port},"zone":"{zone}","weight":{weight}}}"#
        )
    };
    let strings = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
    match format {
        Format::Json => (
            strings(&[
                "/services/shop/web/east/10.0.0.1:80",
                "/services/shop/web/east/10.0.0.2:80",
                "/services/shop/web/west/10.0.0.1:80",
                "/services/shop/web/west",
            ]),
            vec![
                json("10.0.0.1:80", "a", 1),
                json("10.0.0.1:80", "a", 2),
                json("10.0.0.1:80", "b", 1),
                json("10.0.0.2:80", "a", 1),
                "null".to_owned(),
            ],
        ),
        _ => (
            strings(&[
                "/microservices/web/east.shop.web-0.v4",
                "/microservices/web/west.shop.web-0.v4",
                "/microservices/web/",
            ]),
            strings(&[
                r#"{"endpoints":["http://10.0.0.1:80"],"metadata":{"zone":"a"}}"#,
                r#"{"endpoints":["http://10.0.0.1:80","grpc://10.0.0.1:81"],"metadata":{"zone":"a"}}"#,
                r#"{"endpoints":["grpc://10.0.0.1:81","http://10.0.0.1:80","http://10.0.0.1:80"]}"#,
                r#"{"endpoints":["grpc://10.0.0.1:81"],"metadata":{"zone":"b"}}"#,
                r#"{"endpoints":[]}"#,
            ]),
        ),
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = 0usize..8;
    let value = 0usize..8;
    let unheard = prop::collection::vec((key.clone(), prop::option::of(value.clone())), 0..6);
    prop::collection::vec(
        prop_oneof![
            6 => (key.clone(), value).prop_map(|(key, value)| Step::Put(key, value)),
            3 => key.prop_map(Step::Delete),
            1 => unheard.prop_map(Step::Unheard),
            1 => Just(Step::Wipe),
            2 => Just(Step::Read),
            3 => (0usize..2).prop_map(Step::Take),
        ],
        0..60,
    )
}

proptest! {
    #[test]
    fn the_list_is_what_stands_there_and_changes_lead_to_it(
        steps in steps(),
        kratos in any::<bool>(),
        zone in any::<bool>(),
    ) {
        let format = if kratos { Format::Kratos } else { Format::Json };
        let (keys, values) = choices(&format);
        let prefix = format.default_prefix();
        let mut source = Source::service_in(format, prefix, "shop", "web").unwrap();
        if zone {
            source = source.zone("a");
        }
        let mut store = Store::new();
        let mut set = Set::new(source.clone());
        let mut readers = [Reader::default(), Reader::default()];
        let mut revision = 1;
        // Whether the watch has delivered all that happened.
        let mut whole = false;
        for step in steps {
            revision += 1;
            let before = listed(&set);
            match &step {
                Step::Put(key, value) => {
                    let key = &keys[key % keys.len()];
                    let held = (values[value % values.len()].clone(), revision);
                    // What is lost is lost: after it nothing is heard until the list was read.
                    if whole {
                        set.events(&[Event::Put(record(key, &held))]);
                    }
                    store.insert(key.clone(), held);
                }
                Step::Delete(key) => {
                    let key = &keys[key % keys.len()];
                    if store.remove(key).is_some() && whole {
                        set.events(&[Event::Delete(key.as_bytes().into(), revision)]);
                    }
                }
                Step::Unheard(changes) => {
                    whole = false;
                    for (key, value) in changes {
                        let key = keys[key % keys.len()].clone();
                        revision += 1;
                        match value {
                            Some(value) => {
                                store.insert(key, (values[value % values.len()].clone(), revision));
                            }
                            None => { store.remove(&key); }
                        }
                    }
                }
                Step::Wipe => {
                    whole = false;
                    store.clear();
                    revision = 1;
                }
                Step::Read => {
                    whole = true;
                    set.snapshot(&all(&store));
                }
                Step::Take(reader) => readers[*reader].take(),
            }
            for change in set.changes() {
                for reader in &mut readers {
                    reader.pending.note(&change);
                }
            }
            let listed = listed(&set);
            if whole {
                prop_assert_eq!(&listed, &expected(&source, &store));
                let seen: Vec<(Key, Revision)> =
                    all(&store).into_iter().map(|kv| (kv.key, kv.mod_revision)).collect();
                prop_assert!(set.agrees(revision, &seen));
            } else {
                // What is not heard takes nothing from the list.
                prop_assert_eq!(&listed, &before);
            }
            for reader in &mut readers {
                prop_assert!(reader.pending.touched.len() <= reader.list.len() + listed.len());
            }
        }
        let listed = listed(&set);
        for mut reader in readers {
            reader.take();
            prop_assert_eq!(&reader.list, &listed);
            prop_assert!(reader.pending.is_empty());
        }
    }
}

fn plain(below: &[(&str, &str)]) -> Vec<KeyValue> {
    below
        .iter()
        .map(|(key, value)| record(key, &((*value).to_owned(), 2)))
        .collect()
}

fn addresses(changes: &[Change]) -> Vec<String> {
    changes
        .iter()
        .map(|change| {
            let sign = match change {
                Change::Added(_) => '+',
                Change::Changed { .. } => '~',
                Change::Removed(_) => '-',
            };
            format!("{sign}{}", change.endpoint().address())
        })
        .collect()
}

#[test]
fn what_is_new_comes_before_what_is_gone() {
    let source = Source::service_in(Format::Plain, "/", "shop", "web").unwrap();
    let mut set = Set::new(source);
    let mut pending = Pending::default();
    let mut note = |set: &mut Set| {
        for change in set.changes() {
            pending.note(&change);
        }
        addresses(&pending.take())
    };
    set.snapshot(&plain(&[
        ("/web/1", "10.0.0.1:80"),
        ("/web/2", "10.0.0.2:80"),
    ]));
    assert_eq!(note(&mut set), ["+10.0.0.1:80", "+10.0.0.2:80"]);
    // The first goes, the second has another key, and a third comes.
    set.snapshot(&plain(&[
        ("/web/9", "10.0.0.2:80"),
        ("/web/3", "10.0.0.3:80"),
    ]));
    assert_eq!(
        note(&mut set),
        [
            "-10.0.0.2:80",
            "+10.0.0.3:80",
            "+10.0.0.2:80",
            "-10.0.0.1:80"
        ]
    );
}

#[test]
fn a_record_that_can_t_be_read_is_told_once_and_takes_nothing_else_along() {
    let source = Source::service_in(Format::Plain, "/", "shop", "web").unwrap();
    let mut set = Set::new(source);
    let records = plain(&[("/web/1", "10.0.0.1:80"), ("/web/2", "not an address")]);
    set.snapshot(&records);
    assert_eq!(set.endpoints().len(), 1);
    assert_eq!(set.unreadable(), 1);
    let told = set.skipped();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].key, "/web/2");
    set.snapshot(&records);
    assert!(set.skipped().is_empty());
    // It is mended, and broken again.
    for (value, unreadable) in [("10.0.0.2:80", 0), ("no address", 1)] {
        let held = (value.to_owned(), 3);
        set.events(&[Event::Put(record("/web/2", &held))]);
        assert_eq!(set.unreadable(), unreadable);
        assert_eq!(set.skipped().len(), unreadable);
    }
}

#[test]
fn keys_that_do_not_agree_are_noticed() {
    let source = Source::service_in(Format::Plain, "/", "shop", "web").unwrap();
    let mut set = Set::new(source);
    set.snapshot(&plain(&[("/web/1", "10.0.0.1:80")]));
    let key = |name: &str| Key::from(name.as_bytes());
    assert!(set.agrees(5, &[(key("/web/1"), 2)]));
    assert!(!set.agrees(5, &[(key("/web/1"), 3)]));
    assert!(!set.agrees(5, &[(key("/web/1"), 2), (key("/web/2"), 2)]));
    assert!(!set.agrees(5, &[]));
    // One that came after those keys were read.
    assert!(set.agrees(1, &[]));
}
