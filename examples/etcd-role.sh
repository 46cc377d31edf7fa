#!/bin/sh
# The etcd user of one cluster's operator, who may touch nothing but what it needs. To be run by an administrator
# of etcd (ETCDCTL_ENDPOINTS and the like as for any etcdctl), before or after `etcdctl auth enable`:
#
#   CLUSTER=east PASSWORD=... sh examples/etcd-role.sh
#
# and then: etcd-registrar run --cluster-name east --etcd-user registrar-east --etcd-password-file FILE
set -eu

# --cluster-name of the operator.
: "${CLUSTER:?set it to the name of the cluster, e.g. east}"
: "${PASSWORD:?set it to the password of the new user}"
name=registrar-$CLUSTER

etcdctl role add "$name"
# The operator's own keys (--registrar-prefix): its election, its leases.
etcdctl role grant-permission "$name" readwrite "/registrar/$CLUSTER/" --prefix=true
# Where its registrations stand: every prefix that its policy grants, separated by blanks.
for prefix in ${RECORDS:-/services/}; do
	etcdctl role grant-permission "$name" readwrite "$prefix" --prefix=true
done
# The password by standard input, so that it does not show in the list of processes.
printf '%s\n' "$PASSWORD" | etcdctl user add "$name" --interactive=false
etcdctl user grant-role "$name" "$name"
