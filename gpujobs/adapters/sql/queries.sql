-- name: set_meta
INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = excluded.value;

-- name: get_meta
SELECT value FROM meta WHERE name = :name;

-- name: pass_over
UPDATE sqlite_sequence SET seq = :number WHERE name = 'submissions' AND seq < :number;

-- name: begin_after
INSERT INTO sqlite_sequence (name, seq)
SELECT 'submissions', :number WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'submissions');

-- name: add_submission
INSERT INTO submissions (uid, submitted_at, file, text, elements)
VALUES (:uid, :submitted_at, :file, :text, :elements);

-- name: add_job
INSERT INTO jobs (number, idx, uid, name, state, active, submitted_at, owner, spec, data)
VALUES (:number, :idx, :uid, :name, :state, 1, :submitted_at, :owner, :spec, :data);

-- name: set_state
UPDATE jobs
SET state = :state, active = :active, started_at = :started_at, ended_at = :ended_at, exit_code = :exit_code,
    attempt = :attempt, reason = :reason, message = :message, data = :data
WHERE number = :number AND idx = :idx;

-- name: add_attempt
INSERT INTO attempts (number, idx, attempt, name, nonce, allocation, choices, decided_at)
VALUES (:number, :idx, :attempt, :name, :nonce, :allocation, :choices, :decided_at);

-- name: set_attempt_container
UPDATE attempts SET config = :config, container = :container, image = :image, digest = :digest
WHERE number = :number AND idx = :idx AND attempt = :attempt;

-- name: set_attempt_started
UPDATE attempts SET started_at = :started_at WHERE number = :number AND idx = :idx AND attempt = :attempt;

-- name: set_attempt_ended
UPDATE attempts SET ended_at = :ended_at, exit_code = :exit_code, reason = :reason, message = :message
WHERE number = :number AND idx = :idx AND attempt = :attempt;

-- name: close_log
UPDATE attempts SET log_closed = 1 WHERE number = :number AND idx = :idx AND attempt = :attempt;

-- name: set_removed
UPDATE attempts SET removed = 1 WHERE number = :number AND idx = :idx AND attempt = :attempt;

-- name: active_jobs
SELECT * FROM jobs WHERE active = 1 ORDER BY number, idx;

-- name: page_active
SELECT * FROM jobs WHERE active = 1 ORDER BY number, idx LIMIT :limit;

-- name: page_all
SELECT * FROM jobs WHERE (number, idx) < (:number, :idx) ORDER BY number DESC, idx DESC LIMIT :limit;

-- name: one_job
SELECT * FROM jobs WHERE number = :number AND idx = :idx;

-- name: submission_jobs
SELECT * FROM jobs WHERE number = :number ORDER BY idx;

-- name: job_attempts
SELECT * FROM attempts WHERE number = :number AND idx = :idx ORDER BY attempt;

-- name: one_attempt
SELECT * FROM attempts WHERE number = :number AND idx = :idx AND attempt = :attempt;

-- name: kept_attempts
SELECT attempts.*, jobs.state, jobs.active AND jobs.attempt = attempts.attempt AS active
FROM attempts JOIN jobs USING (number, idx) WHERE removed = 0 ORDER BY number, idx, attempt;

-- name: expired_attempts
SELECT * FROM attempts WHERE removed = 0 AND ended_at IS NOT NULL AND log_closed = 1 AND ended_at < :before;

-- name: next_expiry
SELECT min(ended_at) AS ended_at FROM attempts WHERE removed = 0 AND ended_at IS NOT NULL AND log_closed = 1;

-- name: open_logs
SELECT * FROM attempts WHERE log_closed = 0 AND ended_at IS NOT NULL;

-- name: add_context
INSERT INTO contexts (number, key, context, dockerfile, deadline)
VALUES (:number, :key, :context, :dockerfile, :deadline);

-- name: kept_contexts
SELECT * FROM contexts WHERE removed = 0 ORDER BY number, key;

-- name: set_context_received
UPDATE contexts SET received = 1 WHERE number = :number AND key = :key;

-- name: set_context_removed
UPDATE contexts SET removed = 1 WHERE number = :number AND key = :key;

-- name: add_build
INSERT INTO builds (number, build, image) VALUES (:number, :build, :image)
ON CONFLICT (number, build) DO UPDATE SET image = excluded.image;

-- name: submission_builds
SELECT build, image FROM builds WHERE number = :number;

-- name: add_secrets
INSERT INTO secrets (number, file) VALUES (:number, :file);

-- name: kept_secrets
SELECT number, file FROM secrets;

-- name: remove_secrets
DELETE FROM secrets WHERE number = :number;
