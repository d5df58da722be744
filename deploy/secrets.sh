#!/bin/bash
# Makes the files below deploy/secrets from which docker-compose.yml takes its secrets:   deploy/secrets.sh
#
# What is there already stays: to renew one, remove its file and those that are made from it. The files can
# be read by every user, because a container's user is not this host's; the folder can be entered by its
# owner alone.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p secrets
chmod 0700 secrets
cd secrets

fresh() {
  test -s "$1" || head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$1"
}

made() {
  test -s "$1" || printf '%s\n' "$2" >"$1"
}

for name in recoup_api_key recoup_secret postgres_password valkey_password grafana_password; do
  fresh "$name"
done
made recoup_database_url "postgresql+psycopg://recoup:$(<postgres_password)@postgres:5432/recoup"
made recoup_broker_url "redis://recoup:$(<valkey_password)@valkey:6379/0"
# One user, who may do to Recoup's own keys and channels whatever a client does, and nothing to the server.
made valkey_acl "user default off
user recoup on #$(printf %s "$(<valkey_password)" | sha256sum | cut -d' ' -f1) resetchannels &* ~recoup:* +@all -@admin -@dangerous +info"
chmod 0444 ./*
echo "The API's key is in deploy/secrets/recoup_api_key."
