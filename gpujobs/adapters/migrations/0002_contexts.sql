-- Build contexts that clients send after their submission, and the images that came of builds.

CREATE TABLE contexts (
    number     INTEGER NOT NULL REFERENCES submissions (number),
    key        TEXT    NOT NULL,            -- a secret of the submitter's, part of the address it is sent to
    context    TEXT    NOT NULL,            -- the directory, on the client's machine
    dockerfile TEXT    NOT NULL,            -- its Dockerfile's path in it
    deadline   REAL    NOT NULL,            -- when its jobs fail if it has not come
    received   INTEGER NOT NULL DEFAULT 0,
    removed    INTEGER NOT NULL DEFAULT 0,  -- 1 when its file is gone
    PRIMARY KEY (number, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX contexts_kept ON contexts (number) WHERE removed = 0;

CREATE TABLE builds (
    number INTEGER NOT NULL REFERENCES submissions (number),
    build  TEXT    NOT NULL,  -- the digest of core.spec.Build as JSON
    image  TEXT    NOT NULL,  -- the Engine's id
    PRIMARY KEY (number, build)
) STRICT, WITHOUT ROWID;
