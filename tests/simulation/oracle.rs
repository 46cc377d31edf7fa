//! What was wanted at any point of a run, computed from scratch and remembered.
//!
//! Takes resource versions of pods and registrations and a policy, gives the records that were wanted then.
//! Must never ask an operator.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use etcd_registrar::accept::AcceptSettings;
use etcd_registrar::accept::policy::Policy;
use etcd_registrar::engine::io::Registration;

use crate::expected::{Wanted, accepted, expected};
use crate::model_kube::Kube;

/// What someone knows when a plan is made: resource versions, and which policy was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) pods: u64,
    pub(crate) registrations: u64,
    pub(crate) policy: usize,
}

/// The records that are wanted, by key.
pub(crate) type Records = BTreeMap<String, Wanted>;

/// The policy files that there are, and what each grants, told a second time: format, namespace, key.
pub(crate) struct PolicyFile {
    pub(crate) text: &'static str,
    pub(crate) grants: fn(&str, &str, &str) -> bool,
}

/// So many of them, from the first, take turns where the policy changes.
pub(crate) const TAKE_TURNS: usize = 2;
/// The one that holds removals, and for how many seconds.
pub(crate) const HOLDING: usize = 2;
pub(crate) const HOLD_SECONDS: u64 = 60;

/// The first one, or the one that holds, is in force at the beginning and at the end.
pub(crate) const POLICIES: [PolicyFile; 3] = [
    PolicyFile {
        text: r#"
rules:
  - namespaces: ["*"]
    formats: [Json, Plain, Grpc, Traefik, GoMicro, Apisix]
    prefixes: ["*"]
"#,
        grants: |_, _, _| true,
    },
    PolicyFile {
        text: r#"
rules:
  - namespaces: ["*"]
    formats: [Json]
    prefixes: ["/services/{namespace}/"]
  - namespaces: [shop]
    formats: [Plain]
    prefixes: ["plain/"]
"#,
        grants: |format, namespace, key| match format {
            "Json" => key.starts_with(&format!("/services/{namespace}/")),
            "Plain" => namespace == "shop" && key.starts_with("plain/"),
            _ => false,
        },
    },
    PolicyFile {
        text: r#"
rules:
  - namespaces: ["*"]
    formats: [Json, Plain, Grpc, Traefik, GoMicro, Apisix]
    prefixes: ["*"]
massRemovals:
  - namespaces: ["*"]
    percent: 20
    leastPods: 1
    holdSeconds: 60
"#,
        grants: |_, _, _| true,
    },
];

/// The memory.
pub(crate) struct Oracle {
    pub(crate) settings: AcceptSettings,
    policies: Vec<Policy>,
    records: HashMap<(usize, usize, usize), Rc<Records>>,
}

impl Oracle {
    pub(crate) fn new(settings: AcceptSettings) -> Self {
        let policies = POLICIES
            .iter()
            .map(|file| Policy::parse(file.text).expect("the policy"))
            .collect();
        Self {
            settings,
            policies,
            records: HashMap::new(),
        }
    }

    pub(crate) fn policy(&self, which: usize) -> &Policy {
        self.policies.get(which).expect("a policy")
    }

    /// The records that were wanted then. Zones are those of now: they are compared elsewhere.
    pub(crate) fn wanted(&mut self, kube: &Kube, known: Known) -> Rc<Records> {
        let (pods, registrations) = kube.state_at(known.pods, known.registrations);
        let state = (pods, registrations, known.policy);
        if let Some(found) = self.records.get(&state) {
            return Rc::clone(found);
        }
        let found = Rc::new(expected(
            kube,
            &kube.pods_at(known.pods),
            &kube.registrations_at(known.registrations),
            self.policy(known.policy),
            &self.settings,
        ));
        self.records.insert(state, Rc::clone(&found));
        found
    }

    /// The registration of that name then, and whether it was served.
    pub(crate) fn registration<'a>(
        &self,
        kube: &'a Kube,
        known: Known,
        full_name: &str,
    ) -> Option<(&'a Registration, Standing)> {
        let found = kube
            .registrations_at(known.registrations)
            .into_iter()
            .find(|found| format!("{}/{}", found.namespace, found.name) == full_name)?;
        let standing = match accepted(found, self.policy(known.policy), &self.settings) {
            None => Standing::Kept,
            Some(accepted) if accepted.suspend => Standing::Suspended,
            Some(_) => Standing::Served,
        };
        Some((found, standing))
    }
}

/// What becomes of the records of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// They are as they are wanted.
    Served,
    /// Nothing is put or removed.
    Suspended,
    /// It can't be read or is refused: nothing is put, and what is there stays while its pod is ready and
    /// the policy grants it.
    Kept,
}
