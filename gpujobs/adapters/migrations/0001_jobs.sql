-- Times are seconds since the epoch. An idx of -1 means that the job is no element of an array.

CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE submissions (
    number       INTEGER PRIMARY KEY AUTOINCREMENT,
    uid          INTEGER NOT NULL,
    submitted_at REAL    NOT NULL,
    file         TEXT    NOT NULL,  -- the file's name as its user wrote it
    text         TEXT    NOT NULL,  -- the file as it was submitted
    elements     INTEGER NOT NULL
) STRICT;

CREATE TABLE jobs (
    number       INTEGER NOT NULL REFERENCES submissions (number),
    idx          INTEGER NOT NULL,
    uid          INTEGER NOT NULL,
    name         TEXT    NOT NULL,
    state        TEXT    NOT NULL,
    active       INTEGER NOT NULL,  -- 1 until it has ended
    submitted_at REAL    NOT NULL,
    started_at   REAL,
    ended_at     REAL,
    exit_code    INTEGER,
    attempt      INTEGER NOT NULL DEFAULT 0,
    reason       TEXT    NOT NULL DEFAULT '',
    message      TEXT    NOT NULL DEFAULT '',
    owner        TEXT    NOT NULL,  -- JSON of core.job.Owner
    spec         TEXT    NOT NULL,  -- JSON of core.spec.JobSpec
    data         TEXT    NOT NULL,  -- JSON of the state's own fields
    PRIMARY KEY (number, idx)
) STRICT, WITHOUT ROWID;

CREATE INDEX jobs_active ON jobs (number, idx) WHERE active = 1;

CREATE TABLE attempts (
    number     INTEGER NOT NULL,
    idx        INTEGER NOT NULL,
    attempt    INTEGER NOT NULL,
    name       TEXT    NOT NULL UNIQUE,  -- the container's
    nonce      TEXT    NOT NULL,
    allocation TEXT    NOT NULL,         -- JSON of core.job.Allocation
    choices    TEXT    NOT NULL,         -- why these GPUs: JSON
    config     TEXT    NOT NULL DEFAULT '',
    container  TEXT,                     -- the Engine's id
    image      TEXT    NOT NULL DEFAULT '',
    digest     TEXT,
    decided_at REAL    NOT NULL,
    started_at REAL,
    ended_at   REAL,
    exit_code  INTEGER,
    reason     TEXT    NOT NULL DEFAULT '',
    message    TEXT    NOT NULL DEFAULT '',
    log_closed INTEGER NOT NULL DEFAULT 0,
    removed    INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (number, idx, attempt),
    FOREIGN KEY (number, idx) REFERENCES jobs (number, idx)
) STRICT, WITHOUT ROWID;

CREATE INDEX attempts_kept ON attempts (ended_at) WHERE removed = 0;
